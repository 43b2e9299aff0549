// What the GPU process computes when its device is the CPU and the rows are few: decode.
//
// With few rows a product is bound by reading weights, keys and values once, and a GEMM library's set-up
// costs more than the arithmetic. Nothing here runs in the TEE.
//
// Element E is bf16 (as its 16 bits) or f32.
//
// NOTE(numerics): f32 accumulators, one rounding to E at the output. The order of additions differs between
// instruction sets, and AVX512_BF16 takes denormals as zero, so results agree to f32 rounding and not bit for
// bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

// y = x W^T + b.
//
//   Shapes:   x [rows, inputs] E, dense; weight [outputs, inputs] E, dense; bias [outputs] E or null;
//             out [rows, outputs] E, dense. Items are outputs.
//   Source:   torch.nn.functional.linear.
struct LinearArgs {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    std::size_t rows, inputs, outputs;
};

// The scores of the query heads that share one kv head, one row each, against cached keys.
//
//   Shapes:   query [heads, dim] E, dense; keys [dim, columns] E, row stride key_stride; out [heads, columns]
//   E,
//             dense. Items are blocks of kColumnBlock columns; columns is a multiple of it.
struct DecodeScoresArgs {
    const void* query;
    const void* keys;
    void* out;
    std::size_t heads, dim, columns, key_stride;
};
inline constexpr std::size_t kColumnBlock = 64;

// Probabilities of the query heads that share one kv head, one row each, times cached values.
//
//   Shapes:   probabilities [heads, columns] E, dense; values [columns, dim] E, dense; out [heads, dim] E,
//   dense.
struct DecodeContextArgs {
    const void* probabilities;
    const void* values;
    void* out;
    std::size_t heads, dim, columns;
};

struct FewRowsElementKernels {
    void (*linear)(const LinearArgs&, std::size_t begin, std::size_t end) noexcept;
    void (*decode_scores)(const DecodeScoresArgs&, std::size_t begin, std::size_t end) noexcept;
    void (*decode_context)(const DecodeContextArgs&) noexcept;
};

struct FewRowsKernels {
    FewRowsElementKernels bf16;
    FewRowsElementKernels f32;
};

#if defined(__x86_64__)
extern const FewRowsKernels kAvx2FewRows;        // few_rows_avx2.cpp: AVX2 and FMA
extern const FewRowsKernels kAvx512Bf16FewRows;  // few_rows_avx512bf16.cpp: AVX-512 and AVX512_BF16
#endif

}  // namespace tsqp
