#include "border/ring.h"

#include <sched.h>

#include <chrono>

namespace tsqp {
namespace {

void pause_processor() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Wait RingReader::wait(std::uint64_t spin_ns, std::uint64_t yield_ns) const {
    if (available()) return Wait::ready;
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const auto spin_end = start + std::chrono::nanoseconds(spin_ns);
    while (Clock::now() < spin_end) {
        // The clock costs as much as a few looks, so it is read once in a while.
        for (int look = 0; look < 16; ++look) {
            if (available()) return Wait::spun;
            pause_processor();
        }
    }
    const auto yield_end = spin_end + std::chrono::nanoseconds(yield_ns);
    while (Clock::now() < yield_end) {
        sched_yield();
        if (available()) return Wait::yielded;
    }
    return Wait::timeout;
}

}  // namespace tsqp
