// The rings as the TEE process uses them, while the peer writes whatever it likes into every word that it can
// reach. What must come of each call is worked out here again, from the words as they lie in the arena before
// it.
#include "border/ring.h"

#include "engine.h"
#include "fixed_pages.h"

using namespace tsqp;

namespace {

// In the order of `Control`.
enum Word { submitted, submissions_taken, gpu_parked, completed, completions_taken, tee_parked };

enum class Call { returned_false, returned_true, violation };

template <class Act>
Call outcome(Act act) {
    try {
        return act() ? Call::returned_true : Call::returned_false;
    } catch (const PeerViolation& error) {
        CHECK(error.found < error.lowest || error.found > error.highest);
        return Call::violation;
    }
}

class Session {
  public:
    Session() : writer_(pages_.base(), kSubmissionRing), reader_(pages_.base(), kCompletionRing) {}

    void step(Input& input) {
        switch (input.take<std::uint8_t>() % 5) {
            case 0:
                return write(input);
            case 1:
                return read();
            case 2:
                return park();
            case 3:
                return scribble_control(input);
            default:
                return scribble_record(input);
        }
    }

  private:
    std::uint64_t& control(Word word) const {
        return *reinterpret_cast<std::uint64_t*>(pages_.base() + kControlOffset +
                                                 static_cast<std::size_t>(word) * sizeof(ControlWord));
    }
    std::byte* record(std::size_t ring_offset, std::uint64_t position) const {
        return pages_.base() + ring_offset + position % kRingDepth * kRecordBytes;
    }

    void write(Input& input) {
        Record sent;
        for (std::uint64_t& word : sent) word = input.take<std::uint8_t>();
        const std::uint64_t head = control(submissions_taken), parked = control(gpu_parked);
        const bool allowed = head <= written_ && written_ - head < kRingDepth;
        const bool rings = allowed && parked % 2 == 1 && parked != rung_;
        CHECK(outcome([&] { return writer_.write(sent); }) == (!allowed ? Call::violation
                                                               : rings  ? Call::returned_true
                                                                        : Call::returned_false));
        if (allowed) {
            CHECK(std::memcmp(record(kSubmissionRingOffset, written_), sent.data(), kRecordBytes) == 0);
            ++written_;
        }
        if (rings) rung_ = parked;
        CHECK(control(submitted) == written_ && control(submissions_taken) == head);
    }

    Call availability() const {
        const std::uint64_t tail = control(completed);
        if (tail < taken_ || tail - taken_ > kRingDepth) return Call::violation;
        return tail == taken_ ? Call::returned_false : Call::returned_true;
    }

    void read() {
        const Call available = availability();
        CHECK(outcome([&] { return reader_.available(); }) == available);
        if (available != Call::returned_true) return;
        const Record found = reader_.take();
        CHECK(std::memcmp(record(kCompletionRingOffset, taken_), found.data(), kRecordBytes) == 0);
        ++taken_;
        CHECK(control(completions_taken) == taken_);
    }

    void park() {
        const Call available = availability();
        const Call parked = outcome([&] { return reader_.park(); });
        CHECK(parked == (available == Call::violation        ? Call::violation
                         : available == Call::returned_false ? Call::returned_true
                                                             : Call::returned_false));
        if (parked != Call::returned_false) {
            // It sleeps under a new odd number, so that it is rung once.
            CHECK(control(tee_parked) % 2 == 1 && control(tee_parked) > last_park_);
            last_park_ = control(tee_parked);
            reader_.unpark();
        }
        CHECK(control(tee_parked) % 2 == 0);
    }

    void scribble_control(Input& input) {
        // The words that the peer owns, near their value or anything at all.
        constexpr Word kOfPeer[] = {submissions_taken, gpu_parked, completed};
        const auto choice = input.take<std::uint8_t>();
        std::uint64_t& word = control(kOfPeer[choice % 3]);
        const std::uint64_t value = input.take_number();
        word = choice & 0x80 ? value : word + value - 64;
    }

    void scribble_record(Input& input) {
        const auto at = input.take<std::uint16_t>() % (kRingDepth * kRecordBytes);
        pages_.base()[kCompletionRingOffset + at] = input.take<std::byte>();
    }

    FixedPages pages_;
    RingWriter writer_;
    RingReader reader_;
    std::uint64_t written_ = 0, rung_ = 0, taken_ = 0, last_park_ = 0;
};

int run_one(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    for (Session session; !input.empty();) session.step(input);
    return 0;
}

}  // namespace

int main(int argc, char** argv) { return LLVMFuzzerRunDriver(&argc, &argv, run_one); }
