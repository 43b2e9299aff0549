#if defined(__SANITIZE_THREAD__) && !defined(__clang__)
// TSan does not model fences. Every shared word is atomic, so it has no race to miss here.
#pragma GCC diagnostic ignored "-Wtsan"
#endif

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "border/ring.h"
#include "check.h"
#include "fixed_pages.h"

using namespace tsqp;

namespace {

// What a side sleeps on; stands in for the socket.
class Bell {
  public:
    void ring() {
        {
            const std::lock_guard lock(mutex_);
            rung_ = true;
        }
        wake_.notify_one();
    }
    void drain() {
        const std::lock_guard lock(mutex_);
        rung_ = false;
    }
    // False: nobody rang for so long that the wake-up is lost.
    bool sleep() {
        std::unique_lock lock(mutex_);
        return wake_.wait_for(lock, std::chrono::seconds(60), [this] { return rung_; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable wake_;
    bool rung_ = false;
};

Record numbered(std::uint64_t number) {
    Record record;
    for (std::size_t i = 0; i < record.size(); ++i) record[i] = number * record.size() + i;
    return record;
}

template <typename Act>
bool violates(Act act) {
    try {
        act();
    } catch (const PeerViolation&) {
        return true;
    }
    return false;
}

void test_records_come_in_order_around_the_ring() {
    const FixedPages pages;
    RingWriter writer(pages.base(), kSubmissionRing);
    RingReader reader(pages.base(), kSubmissionRing);
    for (const std::size_t burst : {std::size_t{1}, kRingDepth, std::size_t{5}, kRingDepth - 1, kRingDepth}) {
        for (std::size_t i = 0; i < burst; ++i) CHECK(!writer.write(numbered(writer.written())));
        for (std::size_t i = 0; i < burst; ++i) {
            CHECK(reader.available());
            const Record expected = numbered(reader.taken());
            CHECK(reader.take() == expected);
        }
        CHECK(!reader.available());
    }
}

void test_positions_out_of_range_are_violations() {
    const FixedPages pages;
    RingWriter writer(pages.base(), kSubmissionRing);
    RingReader reader(pages.base(), kSubmissionRing);
    const RingWords words(pages.base(), kSubmissionRing);
    for (std::uint64_t i = 0; i < 100; ++i) {
        writer.write(numbered(i));
        reader.take();
    }
    for (const std::uint64_t head :
         {std::uint64_t{0}, 100 - kRingDepth, std::uint64_t{101}, ~std::uint64_t{0}}) {
        words.head().store(head);
        CHECK(violates([&] { writer.write(numbered(100)); }));
    }
    for (const std::uint64_t tail :
         {std::uint64_t{0}, std::uint64_t{99}, 101 + kRingDepth, ~std::uint64_t{0}}) {
        words.tail().store(tail);
        CHECK(violates([&] { reader.available(); }));
        CHECK(violates([&] { reader.park(); }));
    }
}

void test_a_park_is_rung_once() {
    const FixedPages pages;
    RingWriter writer(pages.base(), kCompletionRing);
    RingReader reader(pages.base(), kCompletionRing);
    for (int i = 0; i < 3; ++i) {
        CHECK(reader.park());
        CHECK(writer.write(numbered(0)));
        CHECK(!writer.write(numbered(0)));
        reader.unpark();
        reader.take();
        CHECK(!reader.park());
        reader.take();
        CHECK(!writer.write(numbered(0)));
        reader.take();
    }
}

// Takes the next record, asleep until it is rung for if there is none.
Record receive(RingReader& reader, Bell& bell, std::uint64_t spin_ns) {
    while (reader.wait(spin_ns, 0) == Wait::timeout) {
        bell.drain();
        if (reader.park()) {
            CHECK(bell.sleep());
            reader.unpark();
        }
    }
    return reader.take();
}

// Two sides as in a session: records are echoed, a few in flight, and each side sleeps when it has nothing to
// do.
void test_no_wake_up_is_lost(std::uint64_t count, std::uint64_t in_flight, std::uint64_t spin_ns) {
    const FixedPages pages;
    Bell submitted, completed;
    std::thread worker([&] {
        RingReader reader(pages.base(), kSubmissionRing);
        RingWriter writer(pages.base(), kCompletionRing);
        for (std::uint64_t i = 0; i < count; ++i)
            if (writer.write(receive(reader, submitted, spin_ns))) completed.ring();
    });
    RingWriter writer(pages.base(), kSubmissionRing);
    RingReader reader(pages.base(), kCompletionRing);
    for (std::uint64_t i = 0; i < count + in_flight; ++i) {
        if (i >= in_flight) CHECK(receive(reader, completed, spin_ns) == numbered(i - in_flight));
        if (i < count && writer.write(numbered(i))) submitted.ring();
    }
    worker.join();
}

// Whatever the other side scribbles over the control page, a side has records or a violation, and its own
// bounds.
void test_a_scribbling_peer_gets_violations_only() {
    const FixedPages pages;
    std::atomic<bool> stop{false};
    std::thread peer([&] {
        std::mt19937_64 random(1);
        for (std::uint64_t i = 0; !stop; ++i) {
            const std::size_t word = kControlOffset + 128 * (random() % 6);
            const std::uint64_t value = i % 4 ? random() % 200 : random();
            SharedWord(*reinterpret_cast<std::uint64_t*>(pages.base() + word)).store(value);
        }
    });
    RingWriter writer(pages.base(), kSubmissionRing);
    RingReader reader(pages.base(), kCompletionRing);
    for (std::uint64_t i = 0; i < 100000; ++i) {
        violates([&] { writer.write(numbered(i)); });
        violates([&] {
            if (reader.wait(0, 0) != Wait::timeout) reader.take();
        });
        violates([&] { reader.park(); });
        reader.unpark();
    }
    stop = true;
    peer.join();
}

}  // namespace

int main() {
    test_records_come_in_order_around_the_ring();
    test_positions_out_of_range_are_violations();
    test_a_park_is_rung_once();
    test_no_wake_up_is_lost(30000, 1, 0);
    test_no_wake_up_is_lost(30000, 1, 2000);
    test_no_wake_up_is_lost(100000, kRingDepth / 2, 0);
    test_no_wake_up_is_lost(100000, kRingDepth, 0);
    test_a_scribbling_peer_gets_violations_only();
}
