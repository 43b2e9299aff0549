// The cosines and sines of a rotary embedding.
#pragma once

#include <cstddef>

namespace tsqp {

struct RopeTablesArgs {
    const float* inverse_frequencies;
    std::size_t half_dim;
    float scale;
    float* cosines;
    float* sines;
};

// Rows [begin, end) of both tables: of position p and inverse frequency f, scale * cos(p f) and scale * sin(p
// f).
//
//   Shapes:   inverse_frequencies [D/2] f32; cosines, sines [positions, D/2] f32; row-major, dense.
//   Numerics: p f is rounded to f32, as in transformers; cosine and sine of that are rounded to f32 once, and
//   their
//             product with the scale once more. p is at most 2^24, |p f| at most kLargestAngle.
void rope_tables(const RopeTablesArgs& args, std::size_t begin, std::size_t end) noexcept;

}  // namespace tsqp
