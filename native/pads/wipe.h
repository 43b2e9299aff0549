// Zeros over a secret that the compiler may not leave out, though nobody reads them.
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

}  // namespace
}  // namespace tsqp
