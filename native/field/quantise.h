// Which scale a row of activations gets: the rules of `w8` that no floating-point sum decides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "field/field.h"

namespace tsqp {

struct QuantisedRow {
    // NaN for a row that holds a NaN or an infinity: its integers are zeros, and what is made with its scale
    // is NaN, so that whoever reads it sees.
    float scale;
    std::size_t digits;  // 2, or 3 where an integer is larger than two hold
};

// The largest sum xq^2 whose products with no output wrap, by Cauchy and Schwarz: squares is the largest
// sum Wq[j, :]^2 of the Linear.
std::uint64_t squares_limit(std::uint32_t squares);

// x [inputs] f32, private  ->  integers [inputs].
//
//   Numerics: s = the largest f32 <= 32,639 / max|x|, at most FLT_MAX, 1 for zeros; xq = rint(f32(x * s)).
//             (1) Where inputs * max|xq| > 256 sum|xq|, a peak among small numbers, s is the largest f32 <=
//             8,355,711 / max|x|. (2) While a sum may wrap, that is unless 127 sum|xq| < 2^30 - 1 or
//             sum xq^2 <= limit, s is halved.
QuantisedRow quantise_row(const FieldKernels& kernels, const float* x, std::size_t inputs,
                          std::uint64_t limit, std::int32_t* integers);

}  // namespace tsqp
