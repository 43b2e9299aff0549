// Submissions and their completions, as the other side may answer them: in order or not, whole or with any
// byte changed. What is in flight and which rows are lent is kept here a second time.
#include "border/submissions.h"

#include <deque>

#include "engine.h"

using namespace tsqp;

namespace {

constexpr std::size_t kSlots = 3;
constexpr std::uint32_t kRows = 12;

class Session {
  public:
    Session() { tallies_.number_of("QKV"); }

    void step(Input& input) {
        now_ns_ += input.take<std::uint8_t>();
        if (input.take<std::uint8_t>() % 2 == 0)
            submit(input);
        else
            complete(input);
        CHECK(submissions_.num_in_flight() == in_flight_.size());
        for (std::size_t slot = 0; slot < kSlots; ++slot)
            for (std::size_t row = 0; row < kRows; ++row)
                CHECK((loans_.holder(slot, row, row + 1) != nullptr) == is_lent(slot, row));
    }

  private:
    struct Kept {
        Record record;
        Request request;
        std::uint64_t submitted_ns;
    };

    static std::uint16_t slot_of(Input& input) {
        const auto drawn = input.take<std::uint8_t>() % (kSlots + 2);
        return static_cast<std::uint16_t>(drawn == kSlots + 1 ? kNoSlot : drawn);
    }

    void submit(Input& input) {
        Request request{};
        request.operation = input.take<std::uint8_t>() % 16 == 15 ? 1 : 0;
        request.opcode = input.take<std::uint16_t>();
        request.target = input.take<std::uint16_t>();
        request.in_slot = slot_of(input);
        request.out_slot = slot_of(input);
        request.first_row = input.take<std::uint8_t>() % kRows;
        request.rows = input.take<std::uint8_t>() % kRows;
        request.tile_bytes = input.take_number();
        const bool allowed = request.operation == 0 && request.in_slot != kSlots &&
                             request.out_slot != kSlots && in_flight_.size() < kRingDepth;
        bool is_refused = false;
        try {
            in_flight_.push_back({submissions_.submit(request, now_ns_), request, now_ns_});
        } catch (const std::logic_error&) {
            is_refused = true;
        }
        CHECK(is_refused == !allowed);
    }

    void complete(Input& input) {
        if (in_flight_.empty()) return;
        const Kept oldest = in_flight_.front();
        Record found = in_flight_[input.take<std::uint8_t>() % in_flight_.size()].record;
        found[kBusyWord] = input.take_number();
        found[kValueWord] = input.take_number();
        // A byte anywhere, often one that changes nothing.
        reinterpret_cast<std::uint8_t*>(found.data())[input.take<std::uint8_t>() % kRecordBytes] ^=
            static_cast<std::uint8_t>(input.take<std::uint8_t>() % 4);
        const bool allowed =
            std::memcmp(found.data(), oldest.record.data(), 8 * kEchoedWords) == 0 && found[kStatusWord] == 0;
        const std::uint64_t counted_ns = tallies_.operations[0].total_ns;
        bool is_taken = true;
        try {
            submissions_.begin_wait(now_ns_);
            submissions_.complete(found, now_ns_);
        } catch (const UnexpectedCompletion& unexpected) {
            CHECK(unexpected.submitted == oldest.record && unexpected.completed == found);
            is_taken = false;
        }
        CHECK(is_taken == allowed);
        CHECK(tallies_.operations[0].total_ns - counted_ns <= now_ns_ - oldest.submitted_ns);
        if (is_taken) in_flight_.pop_front();
    }

    bool is_lent(std::size_t slot, std::size_t row) const {
        for (const Kept& kept : in_flight_)
            for (const std::size_t lent : {kept.request.in_slot, kept.request.out_slot})
                if (lent == slot && (slot == kTiles ? row < kRows
                                                    : row >= kept.request.first_row &&
                                                          row < kept.request.first_row + kept.request.rows))
                    return true;
        return false;
    }

    static constexpr std::size_t kTiles = 2;
    Loans loans_;
    Tallies tallies_;
    Submissions submissions_{
        7, {{kRows, 16, false}, {kRows, 32, false}, {kRows, 64, true}}, loans_, tallies_};
    std::deque<Kept> in_flight_;
    std::uint64_t now_ns_ = 1;
};

int run_one(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    for (Session session; !input.empty();) session.step(input);
    return 0;
}

}  // namespace

int main(int argc, char** argv) { return LLVMFuzzerRunDriver(&argc, &argv, run_one); }
