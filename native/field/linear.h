// A Linear of `w8` on the threads of the pool: rows to integers, digits, products, results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "field/digit_rows.h"
#include "field/weights.h"

namespace tsqp {

// x [rows, inputs] f32  ->  out [rows, outputs] f32, both private, dense and apart from each other. A row
// with a NaN or an infinity gives a row of NaN, and touches no other.
void apply_linear(const FieldKernels& kernels, const FieldWeights& weights, const float* x, std::size_t rows,
                  float* out);

// Rows are taken in runs of so many blocks, whose digits stay in the second-level cache while the panels go
// over them.
std::size_t blocks_of_a_run(std::size_t depth, std::size_t base);

// The products and results of blocks whose digits are there: rows [num_blocks * kBlockRows, outputs) f32,
// less what the last block lacks.
void multiply_blocks(const FieldKernels& kernels, const FieldWeights& weights, const DigitRows& digit_rows,
                     std::size_t num_blocks, float* out);

}  // namespace tsqp
