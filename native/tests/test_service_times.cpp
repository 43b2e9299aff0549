// What is learnt of service times: naps end before a steady peer does, and follow one that changes its pace.
#include <random>

#include "border/service_times.h"
#include "check.h"

using namespace tsqp;

namespace {

constexpr std::uint64_t kTimerLateNs = 60'000, kMegabyte = 1'000'000;
constexpr std::size_t kDown = 0, kGateUp = 1;

struct Ran {
    std::uint64_t nap_ns;
    std::uint64_t late_ns;  // by how much later than complete it was seen
};

// One operation after the other, each submitted when the one before is complete.
class Clock {
  public:
    Ran run(std::uint64_t took_ns, std::uint64_t size_bytes = kMegabyte, std::size_t operation = kGateUp) {
        const std::uint64_t submitted_ns = now_ns_, complete_ns = submitted_ns + took_ns;
        const std::uint64_t nap_ns = times_.nap_ns(operation, size_bytes, submitted_ns, submitted_ns);
        const std::uint64_t looked_ns = submitted_ns + (nap_ns > 0 ? nap_ns + kTimerLateNs : 0);
        now_ns_ = std::max(looked_ns + 1000, complete_ns);
        times_.completed(operation, size_bytes, submitted_ns, nap_ns > 0, looked_ns, now_ns_);
        return {nap_ns, now_ns_ - complete_ns};
    }

  private:
    ServiceTimes times_;
    std::uint64_t now_ns_ = 1'000'000;
};

void test_a_steady_operation_is_slept_through_in_part_and_never_missed(std::uint64_t took_ns) {
    Clock clock;
    const Ran first = clock.run(took_ns);
    CHECK(first.nap_ns == 0 && first.late_ns == 0);
    for (int i = 0; i < 20; ++i) {
        const Ran ran = clock.run(took_ns);
        CHECK(took_ns / 3 < ran.nap_ns && ran.nap_ns <= kMaxNapNs);
        CHECK(ran.late_ns == 0);
    }
}

void test_a_short_operation_is_not_slept_through(std::uint64_t took_ns) {
    Clock clock;
    for (int i = 0; i < 20; ++i) CHECK(clock.run(took_ns).nap_ns == 0);
}

void test_a_peer_that_becomes_faster_is_followed(std::uint64_t slow_ns, std::uint64_t fast_ns) {
    Clock clock;
    for (int i = 0; i < 5; ++i) CHECK(clock.run(slow_ns).nap_ns <= kMaxNapNs);
    std::uint64_t late_ns = 0;
    for (int i = 0; i < 300; ++i) late_ns = clock.run(fast_ns).late_ns;
    CHECK(late_ns <= 1000);
}

void test_operations_and_magnitudes_are_learnt_apart() {
    constexpr std::uint64_t kSize = 1 << 20;
    Clock clock;
    clock.run(2'000'000, kMegabyte, kDown);
    clock.run(2'000'000, kSize);
    CHECK(clock.run(2'000'000, 1 << 16).nap_ns == 0);
    CHECK(clock.run(2'100'000, kSize * 21 / 20).nap_ns > 0);
}

}  // namespace

int main() {
    std::mt19937_64 random(1);
    const auto between = [&](std::uint64_t low, std::uint64_t high) {
        return std::uniform_int_distribution<std::uint64_t>(low, high)(random);
    };
    for (const std::uint64_t took_ns : {kShortestWaitNs, std::uint64_t{5'000'000}})
        test_a_steady_operation_is_slept_through_in_part_and_never_missed(took_ns);
    for (int i = 0; i < 2000; ++i) {
        test_a_steady_operation_is_slept_through_in_part_and_never_missed(
            between(kShortestWaitNs, 5'000'000));
        test_a_short_operation_is_not_slept_through(between(1, kShortestWaitNs - 50'000));
        test_a_peer_that_becomes_faster_is_followed(between(400'000, std::uint64_t{1} << between(20, 40)),
                                                    between(1, 4'000'000));
    }
    test_operations_and_magnitudes_are_learnt_apart();
}
