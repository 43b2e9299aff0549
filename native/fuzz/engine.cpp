// Joins g++ and libFuzzer. g++ calls a function at every basic block, where clang would count in line: here
// it counts, in counters that libFuzzer looks at. Comparisons need nothing, as both compilers report them by
// the same names.
#include "engine.h"

#include <cstdint>

namespace {

constexpr std::size_t kCounters = 1 << 14;

// SAFETY: libFuzzer finds the section by its name and clears it before each input.
__attribute__((section("__libfuzzer_extra_counters"), used)) std::uint8_t counters[kCounters];

}  // namespace

extern "C" __attribute__((visibility("default"))) void __sanitizer_cov_trace_pc() {
    const auto address = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
    std::uint8_t& counter = counters[(address ^ address >> 14) % kCounters];
    if (counter != UINT8_MAX) ++counter;
}

// g++ reports these comparisons too, and libFuzzer has no use for them.
extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}
