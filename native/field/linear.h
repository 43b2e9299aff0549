// A Linear of `w8` on the threads of the pool.
#pragma once

#include <cstddef>
#include <cstdint>

#include "field/digit_rows.h"
#include "field/weights.h"

namespace tsqp {

// x [rows, inputs] f32  ->  out [rows, outputs] f32, both private, dense and apart from each other: rows to
// integers, digits, products, results. A row with a NaN or an infinity gives a row of NaN, and touches no
// other.
void apply_linear(const FieldKernels& kernels, const FieldWeights& weights, const float* x, std::size_t rows,
                  float* out);

// m [rows, inputs] u32  ->  y [rows, outputs] u32, dense and apart from each other: y = m W mod p, in [0, p),
// exact for every m. Bias and scales take no part in it: the GPU process's work.
//
//   Numerics: m is taken modulo p and centred, c in [-(p-1)/2, (p-1)/2]; a row takes two digits, three or
//             four, as its largest |c| needs. Each word of m is read once: what changes meanwhile gives
//             another product, and nothing else.
void multiply_linear(const FieldKernels& kernels, const FieldWeights& weights, const std::uint32_t* m,
                     std::size_t rows, std::uint32_t* y);

// The products and results of blocks whose digits are there: rows [num_blocks * kBlockRows, outputs) f32,
// less what the last block lacks.
void multiply_blocks(const FieldKernels& kernels, const FieldWeights& weights, const DigitRows& digit_rows,
                     std::size_t num_blocks, float* out);

}  // namespace tsqp
