// What lies in a slot's rows, by its type.
#pragma once

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

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

}  // namespace tsqp
