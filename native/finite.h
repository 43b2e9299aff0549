// Whether numbers of the other side are finite: for --check-finite, which names the operation that first gave
// others.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

inline constexpr std::uint16_t kBf16Exponent = 0x7F80;
inline constexpr std::uint32_t kF32Exponent = 0x7F800000;

// Shapes: bits [count], of bf16 or f32. An exponent of ones is an infinity or a NaN.
template <class Bits>
bool are_finite(const Bits* bits, std::size_t count, Bits exponent) noexcept {
    bool finite = true;
    // UNTRUSTED: who writes while this reads can make the answer wrong; nothing but a message depends on it.
    for (std::size_t i = 0; i < count; ++i) finite &= (bits[i] & exponent) != exponent;
    return finite;
}

}  // namespace tsqp
