// What the TEE computes on slots: one contract per kernel, one table of functions per instruction set.
//
// Element E is bf16 (as its 16 bits) or f32. Arithmetic is f32, never fused, and each kernel rounds to E
// once, at its output. Kernels trust their arguments: whoever fills them in (bind_kernels.cpp) has checked
// every bound, so no address, index or length here comes from shared memory.
//
// NOTE(numerics): bit equality. Every table gives the same bits for the same input on every machine. Sums run
// in kLanes accumulators (element i goes to lane i % kLanes, in ascending order) and lanes are combined as a
// tree: i + 8, i + 4, i + 2, i + 1. A NaN result is always stored as the one quiet NaN 0x7FC0 or 0x7FC00000.
// Rounding to bf16 is to nearest, ties to even. Denormals are kept, and cost time:
// a softmax tile whose every probability is denormal takes about fifteen times as long.
//
// UNTRUSTED: every word of a slot is read once into a register or private memory, whole and aligned
// (words.h), and what is in it is only ever used as a number. So what a kernel works on in a slot begins at a
// word, as does each of its rows; bind_kernels.cpp sees to it. Writes are of whole words too.
//
// Every function works on items [begin, end) of its arguments, so that threads and pipelines can split them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

inline constexpr std::size_t kLanes = 16;

// Adds a block's output to the residual stream and normalises the sum.
//
//   Shapes:   residual [*, C] f32, private, in place; delta [*, C] E or null; weight [C] f32; out [items, C]
//   E.
//             Item i is residual row r = row_index ? row_index[i] : first_row + i, and delta row r; out row
//             i.
//   Numerics: residual[r] += delta[r], in f32;
//             out[i] = E(residual[r] * (1 / sqrt(sum(residual[r]^2) / C + eps)) * weight), left to right.
//             A row whose squares overflow f32 gives zeros (NaN where the element itself is infinite).
//   Source:   transformers LlamaRMSNorm, without its rounding before the weight.
struct AddRmsNormArgs {
    const void* delta;
    void* out;
    float* residual;
    const std::int32_t* row_index;
    std::size_t first_row;
    const float* weight;
    std::size_t hidden;
    float eps;
};

// Widens slot elements into private memory: from [items] E, to [items] f32. Exact, NaN payloads included.
// begin is whole words.
struct LoadArgs {
    const void* from;
    float* to;
};

// Rounds private f32 into a slot: from [items] f32, to [items] E. begin is whole words; what is left of the
// last word becomes 0.
struct StoreArgs {
    const float* from;
    void* to;
};

// Rotates query and key heads in place.
//
//   Shapes:   qk [items, num_heads, head_dim] E, its rows row_elements apart: what lies behind the heads
//   stays as
//             it is; positions [items] i32, each in [0, P);
//             cos, sin [P, head_dim / 2] f32; scratch: head_dim f32, private, one per thread.
//   Numerics: x1' = E(x1 * cos - x2 * sin), x2' = E(x2 * cos + x1 * sin) for the pairs (i, i + head_dim / 2).
//   Source:   transformers LlamaRotaryEmbedding, rotate_half.
struct RopeArgs {
    void* qk;
    const std::int32_t* positions;
    const float* cos;
    const float* sin;
    std::size_t num_heads;
    std::size_t head_dim;
    std::size_t row_elements;
};

// Softmax of a score tile in place, under a causal and window mask.
//
//   Shapes:   scores [H, rows, num_columns] E, dense, num_columns a multiple of kLanes; item i is row i %
//   rows of
//             head i / rows. scratch: num_columns f32, private, one per thread.
//   Mask:     row r sees columns [lo, hi): hi = min(first_valid_end + r, num_columns), lo = max(0, hi -
//   window), or 0
//             where window is 0. The other columns are not used and are written as 0.
//   Numerics: y = scale * score; e = exp(y - max(y)); out = E(e * (1 / sum(e))); y, e and the sum in f32.
//             For bf16 e is within 2^-17 of exact, for f32 within 1 ULP.
//             No column, or only -inf: zeros. A NaN or a +inf in [lo, hi): the columns [lo, hi) are NaN, as
//             in torch.
//   Source:   torch.nn.functional.softmax(scale * scores + mask, dim=-1, dtype=float32).
struct SoftmaxArgs {
    void* scores;
    std::size_t rows;
    std::size_t num_columns;
    float scale;
    std::size_t first_valid_end;
    std::size_t window;
};

// The gate of a feed-forward block.
//
//   Shapes:   gate_up [items, 2F] E, gate first; out [items, F] E, no overlap with gate_up.
//   Numerics: out = E(gate * (gate < 0 ? e : 1) / (1 + e) * up), e = exp(-|gate|), left to right: no overflow
//             for any finite gate. For bf16 e and the quotient are within 2^-17 of exact. Below -87.3 e is
//             denormal, so silu(gate) carries an absolute error of |gate| * 2^-149. gate = -inf gives NaN, as
//             in torch.
//   Source:   torch.nn.functional.silu(gate) * up.
struct SiluMulArgs {
    const void* gate_up;
    void* out;
    std::size_t features;
};

// exp of values <= 0, as softmax and silu_mul use it. In the table so that its error can be measured.
//
//   Shapes:   from, to [items] f32, both private.
//   Numerics: at most 1 ULP of f32 from exact, denormal results within one denormal step, 0 below -104.
//             NaN is kept.
//   Source:   Cephes expf.
struct ExpArgs {
    const float* from;
    float* to;
};

// The first look at a row of logits: where its largest are, and whether all are numbers.
//
//   Shapes:   logits [size] f32, private; maxima [ceil(size / kLogitBlock)] f32: of each run of kLogitBlock.
//   Numerics: exact. False where a logit is a NaN or an infinity; -inf counts as one, maxima are right with
//   it.
struct LogitMaximaArgs {
    const float* logits;
    std::size_t size;
    float* maxima;
};

// What each token weighs against the likeliest one: the softmax before its division, as integers, so that
// sums do not depend on their order.
//
//   Shapes:   logits [items] f32, private; weights [items].
//   Numerics: weight = rint(exp((logit - maximum) * factor) * 2^30), ties to even, exp as in ExpArgs.
//             A token that is 2 * 10^-9 times as likely as the likeliest, or less, weighs one or two units or
//             nothing. logit <= maximum, finite; a logit of -inf weighs nothing. factor in (0, FLT_MAX].
struct LogitWeightsArgs {
    const float* logits;
    float maximum;
    float factor;
    std::uint32_t* weights;
};

inline constexpr std::size_t kLogitBlock = 4 * kLanes;
inline constexpr std::uint32_t kLargestWeight = std::uint32_t{1} << 30;

struct ElementKernels {
    void (*add_rms_norm)(const AddRmsNormArgs&, std::size_t begin, std::size_t end) noexcept;
    void (*load)(const LoadArgs&, std::size_t begin, std::size_t end) noexcept;
    void (*store)(const StoreArgs&, std::size_t begin, std::size_t end) noexcept;
    void (*rope)(const RopeArgs&, float* scratch, std::size_t begin, std::size_t end) noexcept;
    void (*softmax)(const SoftmaxArgs&, float* scratch, std::size_t begin, std::size_t end) noexcept;
    void (*silu_mul)(const SiluMulArgs&, std::size_t begin, std::size_t end) noexcept;
};

struct KernelTable {
    const char* name;
    ElementKernels bf16;
    ElementKernels f32;
    void (*exp_nonpositive)(const ExpArgs&, std::size_t begin, std::size_t end) noexcept;
    bool (*logit_maxima)(const LogitMaximaArgs&) noexcept;
    void (*logit_weights)(const LogitWeightsArgs&, std::size_t begin, std::size_t end) noexcept;
};

extern const KernelTable kScalarKernels;  // kernels_scalar.cpp: the oracle
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;        // kernels_avx2.cpp
extern const KernelTable kAvx512Kernels;      // kernels_avx512.cpp
extern const KernelTable kAvx512Bf16Kernels;  // kernels_avx512bf16.cpp
#endif

}  // namespace tsqp
