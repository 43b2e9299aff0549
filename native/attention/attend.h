// Attention of a whole step over a cache, on the pool's threads.
#pragma once

#include <cstddef>
#include <span>

#include "attention/key_value_cache.h"

namespace tsqp {

// The table for the kernel table in use (kernels/dispatch.h): kernels need no more than AVX-512 has without
// its extensions, so the sets above share its table.
const AttentionTable& active_attention();

// Rows [first_row, first_row + rows) are the positions [position, position + rows) of a sequence.
struct Segment {
    std::size_t sequence, position, first_row, rows;
};

// Where the rows lie, and how they attend: AttendArgs, but for all segments.
struct AttendStep {
    const float* qkv;  // row 0
    float* out;
    std::size_t num_heads;
    float scale, soft_cap;
    std::size_t window;
    const float* sinks;
};

// Appends the keys and values of all segments, then makes their rows of `out`. Raises bad_alloc.
//
// SAFETY: segments and shapes have been checked (bind_attention.cpp): sequences exist, positions fit, no two
// segments have a row or a key in common.
void attend(const AttentionTable& table, const KeyValueCache& cache, const AttendStep& step,
            std::span<const Segment> segments);

// The sum of all words of a sequence's first `positions`, whole blocks, by the same threads: what reading
// alone takes, to measure attention beside it.
std::uint64_t read_blocks(const KeyValueCache& cache, std::size_t sequence, std::size_t positions);

}  // namespace tsqp
