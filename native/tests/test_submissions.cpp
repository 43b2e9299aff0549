// Submissions in flight: what is kept, what is lent, and that no completion but the right one is taken.
#if defined(__SANITIZE_THREAD__) && !defined(__clang__)
// TSan does not model fences. Every shared word is atomic, so it has no race to miss here.
#pragma GCC diagnostic ignored "-Wtsan"
#endif

#include <atomic>
#include <random>
#include <thread>

#include "border/submissions.h"
#include "check.h"
#include "fixed_pages.h"

using namespace tsqp;

namespace {

constexpr std::uint64_t kEpoch = 0xFEED'0000'0000'0001;
constexpr std::uint16_t kX = 0, kQk = 1, kScores = 2, kNone = kNoSlot;

// Submissions of a session with three slots, and a clock that goes on by itself.
struct Session {
    Loans loans;
    Tallies tallies;
    Submissions submissions{kEpoch, {{8, 16, false}, {8, 32, false}, {4, 128, true}}, loans, tallies};
    std::uint64_t now_ns = 1'000'000;

    std::uint64_t tick() { return now_ns += 1000; }

    Record submit(std::uint16_t in_slot = kX, std::uint16_t out_slot = kQk, std::uint32_t first_row = 0,
                  std::uint32_t rows = 1) {
        return submissions.submit(
            {tallies.number_of("QKV"), 3, 7, in_slot, out_slot, first_row, rows, 4, 5, 96}, tick());
    }
    void complete(const Record& record) {
        submissions.begin_wait(tick());
        submissions.complete(record, tick());
    }
    bool is_lent(std::size_t slot, std::size_t row) const {
        return loans.holder(slot, row, row + 1) != nullptr;
    }
};

template <class Error, class Act>
bool throws(Act act) {
    try {
        act();
    } catch (const Error&) {
        return true;
    }
    return false;
}

void test_a_record_holds_what_was_asked_for() {
    Session session;
    const Record record = session.submit(kX, kNone, 6, 2);
    CHECK(record == (Record{1, kEpoch, 0xFFFF'0000'0007'0003, 6 | std::uint64_t{2} << 32,
                            4 | std::uint64_t{5} << 32, 0, 0, 0}));
}

void test_a_completion_that_repeats_its_submission_is_taken() {
    Session session;
    Record record = session.submit();
    record[kBusyWord] = 500;
    record[kValueWord] = ~std::uint64_t{0};
    session.complete(record);
    CHECK(session.submissions.completed() == 1 && session.submissions.num_in_flight() == 0);
    CHECK(session.submissions.busy_ns() == 500 && session.submissions.value() == ~std::uint64_t{0});
    CHECK(session.tallies.operations.at(0).calls == 1 && session.tallies.operations.at(0).total_ns == 500);
    CHECK(session.tallies.waiting_ns == 1000);
}

void test_one_bit_that_differs_is_enough_to_refuse_it() {
    for (std::size_t bit = 0; bit < 64 * kBusyWord; ++bit) {
        Session session;
        const Record submitted = session.submit();
        Record record = submitted;
        record[bit / 64] ^= std::uint64_t{1} << bit % 64;
        try {
            session.complete(record);
            CHECK(false);
        } catch (const UnexpectedCompletion& error) {
            CHECK(error.submitted == submitted && error.completed == record);
        }
        // Nothing has come back by it.
        CHECK(session.submissions.num_in_flight() == 1 && session.is_lent(kX, 0));
    }
}

void test_every_status_but_ok_is_for_the_catcher() {
    for (const std::uint64_t status :
         {std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{3}, std::uint64_t{1} << 32}) {
        Session session;
        Record record = session.submit();
        record[kStatusWord] = status;
        CHECK(throws<UnexpectedCompletion>([&] { session.complete(record); }));
    }
}

void test_completions_come_in_the_order_of_their_submissions() {
    Session session;
    const Record first = session.submit(), second = session.submit();
    CHECK(throws<UnexpectedCompletion>([&] { session.complete(second); }));
    session.complete(first);
    CHECK(throws<UnexpectedCompletion>([&] { session.complete(first); }));
    session.complete(second);
    CHECK(throws<std::logic_error>([&] { session.complete(second); }));
}

void test_rows_are_lent_until_their_submission_is_complete() {
    Session session;
    const Record first = session.submit(kX, kQk, 2, 3), second = session.submit(kScores, kX, 4, 2);
    for (std::size_t row = 0; row < 8; ++row) {
        CHECK(session.is_lent(kX, row) == (row >= 2 && row < 6));
        CHECK(session.is_lent(kQk, row) == (row >= 2 && row < 5));
        // A tile's rows are all of its slot's.
        CHECK(session.is_lent(kScores, row) == (row < 4));
    }
    session.complete(first);
    CHECK(!session.is_lent(kX, 3) && session.is_lent(kX, 4) && !session.is_lent(kQk, 2));
    session.complete(second);
    CHECK(!session.is_lent(kX, 4) && !session.is_lent(kScores, 0));
    CHECK(session.tallies.bytes_to_gpu == 3 * 16 + 96 && session.tallies.bytes_to_tee == 3 * 32 + 2 * 16);
}

void test_there_are_no_more_in_flight_than_the_ring_holds() {
    Session session;
    std::array<Record, kRingDepth> records;
    for (Record& record : records) record = session.submit();
    CHECK(session.submissions.is_full());
    CHECK(throws<std::length_error>([&] { session.submit(); }));
    for (const Record& record : records) session.complete(record);
    session.complete(session.submit());
}

void test_slots_and_operations_that_there_are_not_are_refused() {
    Session session;
    CHECK(throws<std::out_of_range>([&] { session.submit(3); }));
    CHECK(
        throws<std::out_of_range>([&] { session.submissions.submit({9, 3, 7, kX, kQk, 0, 1, 0, 0, 0}, 1); }));
    CHECK(session.submissions.submitted() == 0 && !session.is_lent(kX, 0));
}

void test_a_claim_of_time_is_cut_down_to_what_has_passed() {
    Session session;
    Record record = session.submit();
    record[kBusyWord] = ~std::uint64_t{0};
    session.complete(record);
    CHECK(session.tallies.operations.at(0).total_ns == 2000);
    CHECK(session.tallies.newest_round_trips(9) == std::vector<std::uint64_t>{0});
}

void test_round_trips_of_what_was_alone_are_kept_the_newest_first() {
    Session session;
    const Record first = session.submit(), second = session.submit();
    session.complete(first);
    session.complete(second);
    CHECK(session.tallies.newest_round_trips(9).size() == 1);
    session.complete(session.submit());
    CHECK((session.tallies.newest_round_trips(9) == std::vector<std::uint64_t>{2000, 3000}));
    CHECK((session.tallies.newest_round_trips(1) == std::vector<std::uint64_t>{2000}));
    CHECK(session.tallies.round_trips_by_bits[11] == 1 && session.tallies.round_trips_by_bits[12] == 1);
    CHECK(session.tallies.round_trips_ns == 5000);
    for (std::size_t i = 0; i < 2 * kRoundTripSamples; ++i) session.tallies.add_round_trip(i);
    const auto newest = session.tallies.newest_round_trips(~std::size_t{0});
    CHECK(newest.size() == kRoundTripSamples);
    CHECK(newest.front() == 2 * kRoundTripSamples - 1 && newest.back() == kRoundTripSamples);
}

void test_a_long_operation_is_slept_through_the_next_time() {
    Session session;
    for (const bool is_known : {false, true}) {
        const Record record = session.submit();
        const std::uint64_t begin_ns = session.tick();
        CHECK((session.submissions.begin_wait(begin_ns) > 0) == is_known);
        // However often it is asked.
        CHECK((session.submissions.begin_wait(begin_ns + 900'000) > 0) == is_known);
        session.now_ns += 1'000'000;
        if (is_known) session.submissions.napped(session.tick());
        session.now_ns += 50'000;
        session.submissions.complete(record, session.tick());
    }
}

void test_a_loan_too_many_is_refused() {
    Loans loans;
    CHECK(throws<std::logic_error>([&] { loans.take_back(); }));
    for (std::size_t i = 0; i < 2 * kRingDepth; ++i)
        loans.lend(0, 0, 1, "a name longer than a string has room for");
    CHECK(throws<std::length_error>([&] { loans.lend(0, 0, 1, "QKV"); }));
    CHECK(*loans.holder(0, 0, 1) == "a name longer than a string has room for");
}

// Both sides as in a session, with up to a ring's depth in flight, through the rings.
void test_a_peer_that_answers_through_the_rings_is_served(std::uint64_t count) {
    const FixedPages pages;
    std::thread peer([&] {
        RingReader reader(pages.base(), kSubmissionRing);
        RingWriter writer(pages.base(), kCompletionRing);
        for (std::uint64_t i = 0; i < count; ++i) {
            while (reader.wait(1000, 1'000'000) == Wait::timeout) {
            }
            writer.write(reader.take());
        }
    });
    Session session;
    RingWriter writer(pages.base(), kSubmissionRing);
    RingReader reader(pages.base(), kCompletionRing);
    std::mt19937_64 random(1);
    while (session.submissions.completed() < count) {
        while (!session.submissions.is_full() && session.submissions.submitted() < count && random() % 8 != 0)
            writer.write(session.submit());
        for (std::uint64_t left = random() % (session.submissions.num_in_flight() + 1); left > 0; --left) {
            while (reader.wait(1000, 1'000'000) == Wait::timeout) {
            }
            session.complete(reader.take());
        }
    }
    peer.join();
    CHECK(session.tallies.operations.at(0).calls == count && !session.is_lent(kX, 0));
}

// Whatever the other side writes into the ring of completions, one of them is the right one or the session
// ends.
void test_a_scribbling_peer_completes_nothing() {
    const FixedPages pages;
    std::atomic<bool> stop{false};
    std::thread peer([&] {
        std::mt19937_64 random(1);
        const RingWords words(pages.base(), kCompletionRing);
        while (!stop) {
            words.word(random() % kRingDepth, random() % 8).store(random());
            words.tail().store(random() % 4 != 0 ? 1 : random());
        }
    });
    for (int i = 0; i < 20000; ++i) {
        Session session;
        session.submit();
        RingReader reader(pages.base(), kCompletionRing);
        bool is_over = false;
        try {
            if (reader.wait(0, 0) != Wait::timeout) session.complete(reader.take());
        } catch (const UnexpectedCompletion&) {
            is_over = true;
        } catch (const PeerViolation&) {
            is_over = true;
        }
        CHECK(session.submissions.completed() == 0);
        CHECK(is_over || session.is_lent(kX, 0));
    }
    stop = true;
    peer.join();
}

}  // namespace

int main() {
    test_a_record_holds_what_was_asked_for();
    test_a_completion_that_repeats_its_submission_is_taken();
    test_one_bit_that_differs_is_enough_to_refuse_it();
    test_every_status_but_ok_is_for_the_catcher();
    test_completions_come_in_the_order_of_their_submissions();
    test_rows_are_lent_until_their_submission_is_complete();
    test_there_are_no_more_in_flight_than_the_ring_holds();
    test_slots_and_operations_that_there_are_not_are_refused();
    test_a_claim_of_time_is_cut_down_to_what_has_passed();
    test_round_trips_of_what_was_alone_are_kept_the_newest_first();
    test_a_long_operation_is_slept_through_the_next_time();
    test_a_loan_too_many_is_refused();
    test_a_peer_that_answers_through_the_rings_is_served(50000);
    test_a_scribbling_peer_completes_nothing();
}
