// What checks of products (check.h) are made of, in the field of p = 2^31 - 1. Each instruction set gives the
// scalar one's bits: sums are of integers, and only what they are modulo p is asked for.
//
// Integers are centred, within +-(p - 1) / 2, so that products stay below 2^60 and eight of them fit 64 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "field/field.h"

namespace tsqp {

// Sizes of private arrays of integers are multiples of this; what is past their end is zero.
inline constexpr std::size_t kCheckStep = kPanelOutputs;
// So many rows are summed with a vector at once: two vectors of a long row are past the first-level cache.
inline constexpr std::size_t kCheckRows = 4;

namespace {  // kernels of several instruction sets compile them: see kernels/lanes.h

constexpr std::size_t padded_to_step(std::size_t size) {
    return (size + kCheckStep - 1) / kCheckStep * kCheckStep;
}

constexpr std::int32_t centred(std::uint32_t word) {
    return static_cast<std::int32_t>(word > kPrime / 2 ? word - kPrime : word);
}

// Any number modulo p, in [0, p).
constexpr std::uint32_t residue(std::int64_t number) {
    const std::int64_t rest = number % kPrime;
    return static_cast<std::uint32_t>(rest < 0 ? rest + kPrime : rest);
}

}  // namespace

// A run of a row's words, read once each, as integers and as floats.
//
//   Shapes:   words [size]: memory of the other side, backed up to the end of its last word of 8 bytes, which
//             the first begins; integers [padded_to_step(size)]; scales, bias [padded_to_step(size)], bias or
//             null; pads [size], private and in [0, p), or null; out [size].
//   Numerics: as ResultArgs: out = f32(integer) * (scales / scale) + bias, each rounded once; a NaN is
//             always the quiet NaN 0x7FC00000. With pads, out is made of word + pad mod p, centred, instead of
//             the integer, which is the word's own as without; unspecified for a word that is not below p.
struct TakeArgs {
    const std::uint32_t* words;
    std::size_t size;
    const std::uint32_t* pads;
    const float* scales;
    const float* bias;
    float scale;
    std::int32_t* integers;
    float* out;
};

// sums[r, v] += <rows[r], vectors[v]> modulo p: some number that is congruent, of less than 2^37.
//
//   Shapes:   rows [num_rows, size], `row_stride` elements apart, num_rows 1 to kCheckRows; vectors
//             [num_vectors, size], `vector_stride` apart; sums [num_rows, num_vectors]. size is whole steps.
struct DotsArgs {
    const std::int32_t* rows;
    std::size_t row_stride, num_rows;
    const std::int32_t* vectors;
    std::size_t vector_stride, num_vectors;
    std::size_t size;
    std::int64_t* sums;
};

// What a panel's outputs add to the sums over outputs, two of four neighbours at a time.
//
//   sums[d, k, i] += sum_c digits[d, c] * panel[k, c],   c = 0 1, 4 5, ... for i = 0 and 2 3, 6 7, ... for 1
//
//   Shapes:   panel: `inputs` of a panel from a multiple of four on; digits [digit_rows, 64], digit_rows 2 or
//             4; sums [digit_rows, inputs, 2]. inputs is whole steps.
//   Numerics: exact for fifteen panels on sums that were zero: 15 * 32 * 127 * 2^15 < 2^31.
struct SumPanelArgs {
    const std::int8_t* panel;
    std::size_t inputs;
    const std::int16_t* digits;
    std::size_t digit_rows;
    std::int32_t* sums;
};
inline constexpr std::size_t kSummedPanels = 15;

struct CheckKernels {
    const char* name;
    // to[i] = integers[i] mod p, by whole words: memory of the other side. size is even; |integers| < p.
    void (*write_residues)(const std::int32_t* integers, std::size_t size, std::uint32_t* to) noexcept;
    // Returns the largest word.
    std::uint32_t (*take)(const TakeArgs& args) noexcept;
    void (*dots)(const DotsArgs& args) noexcept;
    void (*sum_panel)(const SumPanelArgs& args) noexcept;
};

extern const CheckKernels kScalarCheck;  // check_scalar.cpp: the oracle
#if defined(__x86_64__)
extern const CheckKernels kAvx2Check;    // check_avx2.cpp
extern const CheckKernels kAvx512Check;  // check_avx512.cpp
#endif

// What this machine can run, slowest first; scalar is always there.
std::vector<const CheckKernels*> supported_check_kernels();

// What goes with an instruction set: every set with AVX-512 has what checks are made of. Raises
// invalid_argument for a set that this machine does not have.
const CheckKernels& check_kernels_of(std::string_view instruction_set);

}  // namespace tsqp
