// Whether numbers of the other side are finite: for --check-finite, which names the operation that first gave
// others.
#pragma once

#include <cstddef>
#include <cstdint>

#include "border/words.h"

namespace tsqp {

inline constexpr std::uint16_t kBf16Exponent = 0x7F80;
inline constexpr std::uint32_t kF32Exponent = 0x7F800000;

// Shapes: bits [count], of bf16 or f32, from the beginning of a word on. An exponent of ones is an infinity
// or a NaN.
template <class Bits>
bool are_finite(const Bits* bits, std::size_t count, Bits exponent) noexcept {
    constexpr std::size_t kBlock = 256;
    bool finite = true;
    Bits block[kBlock];
    for (std::size_t done = 0; done < count; done += kBlock) {
        const std::size_t size = count - done < kBlock ? count - done : kBlock;
        // UNTRUSTED: what changes after this look can make the answer wrong; nothing but a message depends on
        // it.
        read_words(block, bits + done, size * sizeof(Bits));
        for (std::size_t i = 0; i < size; ++i) finite &= (block[i] & exponent) != exponent;
    }
    return finite;
}

}  // namespace tsqp
