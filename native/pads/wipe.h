// Zeros over secrets that the compiler may not leave out, though nobody reads them.
#pragma once

#include <cstddef>
#include <cstring>

namespace tsqp {

namespace {  // kernels of several instruction sets compile it: see kernels_impl.h

[[maybe_unused]] inline void wipe(void* secret, std::size_t size_bytes) {
    std::memset(secret, 0, size_bytes);
    // The empty asm may read all memory that `secret` reaches: what was written has to be there.
    asm volatile("" : : "r"(secret) : "memory");
}

// Over what a function that has returned left on the stack: spilled registers, and variables that held a
// secret on its way. It covers so many bytes; a caller keeps what it calls from being part of itself.
inline constexpr std::size_t kBurntBytes = 2048;
[[gnu::noinline, maybe_unused]] void burn_stack() {
    unsigned char left[kBurntBytes];
    wipe(left, sizeof left);
}

}  // namespace
}  // namespace tsqp
