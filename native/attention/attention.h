// Attention over a private cache of keys and values: one contract, one table of functions per instruction
// set.
//
// The cache of one layer is blocks of kCacheBlock positions; which block holds the positions
// [64 b, 64 b + 64) of a sequence is in a table. Of one kv head in a block, with E = bf16 (its 16 bits) or
// f32 and W the head dim D rounded up to whole lanes,
//
//     keys    [D, 64]   rows of one element of all keys: a sum over D runs in every lane at once
//     values  [64, W]   rows of one value
//
// one behind the other, the kv heads of a block behind each other, the blocks too. For bf16 the rows of both
// lie in pairs, element by element ([rows / 2, columns, 2]): one shift or one mask widens 16 of them.
//
//   Shapes:   qkv rows [(H + 2 G) D] f32: q heads, k heads, v heads; out rows [H D] f32. Row r of a segment is
//             position p + r of its sequence. H is a multiple of G: heads [g H / G, (g + 1) H / G) share kv
//             head g. D is a multiple of 4. sinks [H] f32, a logit of each head, or none.
//   Mask:     the row at position t sees the keys [max(0, t + 1 - window), t + 1), all where window is 0.
//   Numerics: of one row and head, everything f32; fma rounds once; keys and values were rounded to E, to
//             nearest, ties to even, when they were appended, q was not. Block b takes part where it has a
//             visible key:
//                 x_i = sum over d of q[d] * k_i[d]      d = 0 .. D - 1 in order, x = fma(q[d], k_i[d], x) from 0
//                 y_i = x_i * scale                      then soft_cap * tanh(y_i / soft_cap) where that is not 0
//                 m_b = the largest y_i
//                 e_i = exp(y_i - m_b)
//                 s_b[lane] = sum over i of e_i          where lane = i % 16; keys in order, from 0
//                 o_b[d] = sum over i of e_i * v_i[d]    keys in order, o = fma(e_i, v_i[d], o) from 0
//             The state (m, s, o) is (sink, {1, 0, ..}, 0), or without sinks that of the first block, and takes
//             the (other) blocks in order:
//                 f = exp(-|m - m_b|)
//                 (a, c) = m < m_b ? (f, 1) : (1, f)
//                 s = fma(s, a, s_b * c),  o = fma(o, a, o_b * c),  m = max(m, m_b)
//             Then out = o / (sum of s, lanes as a tree: kernels.h). exp is within 1 ULP (ExpArgs), tanh within
//             2 (TanhArgs).
//             So a row's bits depend on q, on what it sees and on nothing else: not on the rows and heads that
//             are computed with it, on the blocks' places, on where its chunk began, on threads, instruction set
//             or what lies behind the keys that it sees. Where a score is a NaN or an infinity the row may be
//             NaN, the same NaN everywhere.
//   Source:   torch.nn.functional.scaled_dot_product_attention; soft cap and sinks as transformers' eager
//             attention of Gemma 2 and gpt-oss.
//
// UNTRUSTED: the rows of qkv are read once, by whole words, as kernels.h asks; addresses and numbers of keys
// come from arguments that bind_attention.cpp has checked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace tsqp {

inline constexpr std::size_t kCacheBlock = 64;

namespace {  // kernels of several instruction sets compile these functions: see kernels/lanes.h

// Columns of a block's values: whole lanes.
inline std::size_t value_columns(std::size_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
// E of one kv head in a block.
inline std::size_t head_elements(std::size_t head_dim) {
    return kCacheBlock * (head_dim + value_columns(head_dim));
}

}  // namespace

// A sequence's part of a cache.
struct CachedSequence {
    void* elements;              // E: block 0 of the cache
    const std::int32_t* blocks;  // where each block of the sequence lies
    std::size_t num_kv_heads, head_dim;
};

// Rounds keys and values to E and writes them into the cache.
//
//   Shapes:   rows [items] of qkv, row_elements apart; row i is position + i. scratch: value_columns(D) f32.
struct AppendArgs {
    CachedSequence cache;
    const float* qkv;
    std::size_t row_elements, num_heads;
    std::size_t position;
};

// One segment, whose keys are in the cache.
struct AttendArgs {
    CachedSequence cache;
    const float* qkv;
    float* out;
    std::size_t row_elements, num_heads;
    std::size_t position;
    float scale, soft_cap;
    std::size_t window;
    const float* sinks;
};

// Query vectors of a segment that are computed together: vector v of kv head g is row v / (H / G), head
// g H / G + v % (H / G).
struct QueryTile {
    std::size_t kv_head, first_vector, num_vectors;  // num_vectors <= kTileVectors
    std::size_t first_block, end_block;              // those in which one of them sees a key
};

inline constexpr std::size_t kTileVectors = 32;

namespace {

// f32 of one block's (m, s, o) of a tile, and of the private scratch of one thread.
inline std::size_t record_elements(std::size_t num_vectors, std::size_t head_dim) {
    return kTileVectors + num_vectors * (kLanes + value_columns(head_dim));
}
inline std::size_t scratch_elements(std::size_t head_dim) {
    return 2 * kTileVectors + kTileVectors * (value_columns(head_dim) + kCacheBlock) +
           2 * record_elements(kTileVectors, head_dim);
}

}  // namespace

// tanh as the soft cap uses it. In the table so that its error can be measured.
//
//   Shapes:   from, to [items] f32, both private.
//   Numerics: at most 2 ULP of f32 from exact, NaN is kept.
//   Source:   Cephes tanhf.
struct TanhArgs {
    const float* from;
    float* to;
};

struct ElementAttention {
    void (*append)(const AppendArgs&, float* scratch, std::size_t begin, std::size_t end) noexcept;
    // All of a tile.
    void (*attend)(const AttendArgs&, const QueryTile&, float* scratch) noexcept;
    // The blocks [begin, end) of a tile alone, each to a record of its own; `merge` makes the rows of the
    // records of all blocks of the tile.
    void (*attend_blocks)(const AttendArgs&, const QueryTile&, std::size_t begin, std::size_t end,
                          float* records, float* scratch) noexcept;
    void (*merge)(const AttendArgs&, const QueryTile&, const float* records, float* scratch) noexcept;
};

struct AttentionTable {
    const char* name;
    ElementAttention bf16, f32;
    void (*hyperbolic_tangent)(const TanhArgs&, std::size_t begin, std::size_t end) noexcept;
};

extern const AttentionTable kScalarAttention;  // attention_scalar.cpp: the oracle
#if defined(__x86_64__)
extern const AttentionTable kAvx2Attention;    // attention_avx2.cpp
extern const AttentionTable kAvx512Attention;  // attention_avx512.cpp
#endif

}  // namespace tsqp
