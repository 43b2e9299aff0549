// What lies in a slot's rows, by its type.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "border/slots.h"

namespace tsqp {

inline std::uint16_t* bf16_elements(const Rows& rows) { return reinterpret_cast<std::uint16_t*>(rows.data); }
inline const float* f32_elements(const Rows& rows) { return reinterpret_cast<const float*>(rows.data); }

// Where an element lies, counted over all rows.
inline std::byte* element_of(const Rows& rows, std::size_t element) {
    return rows.data + element * element_bytes(rows.dtype);
}

inline float widened(std::uint16_t bits) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// To nearest, ties to even.
inline std::uint16_t rounded(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return x != x ? std::uint16_t{0x7FC0}
                  : static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

}  // namespace tsqp
