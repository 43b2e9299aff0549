// Rows in float32 as rows for products of bf16: each element is the sum of two terms, and a product of them
// sums over both.
//
// A row [K] becomes one of [2K]: of each 32 elements the first terms, then the second ones. The right-hand side
// is the one that there is: its blocks of 32 rows are named twice (PanelArgs::blocks), so that they are read
// from memory once, and where one row is multiplied, which is bound by that, the second term costs little.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "products/panels.h"

namespace tsqp {

inline constexpr std::size_t kTermBlockBits = 5, kTermBlock = std::size_t{1} << kTermBlockBits;
static_assert(kTermBlock == kDepthBlock && kKeyBlock % kTermBlock == 0);
// Elements from one block of a panel's rows to the next.
inline constexpr std::size_t kTermBlockStride = kTermBlock * kPanelColumns;

// from [elements] f32, whole blocks of 32  ->  to [2 * elements] bf16.
//   Numerics: first = bf16(x), second = bf16(x - first): together within 2^-17 of x. The second term of what is
//             no finite number in bf16 is 0.
void split_into_terms(const float* from, std::size_t elements, std::uint16_t* to);

// from [elements] f32  ->  to [elements] bf16, to nearest, ties to even.
void round_to_bf16(const float* from, std::size_t elements, std::uint16_t* to);

// from [elements] bf16  ->  to [elements] f32, exact.
void widen(const std::uint16_t* from, std::size_t elements, float* to);

// The blocks of 32 rows of a matrix with `depth` rows, one behind the other, each of them twice.
std::vector<std::int32_t> blocks_of_terms(std::size_t depth);

}  // namespace tsqp
