// Pads of a row: uniform words of the field, out of the stream of a key, and integers less their pads.
//
//   stream    AES-256 in counter mode; counter block = 32 zero bits | row (64) | block (32), big-endian
//   word k    the little-endian bytes 4 k .. 4 k + 3 of the stream, without the top bit
//   r[k]      word k, k < K; a word equal to p is replaced, in ascending k, by the next of words K, K + 1,
//             ... that is not p
//   m[k]      integers[k] - r[k] mod p
//
// Of 2^31 words one is p, so uniform words give a uniform r, and a row hardly ever needs more than K words.
//
// How long a kernel takes depends on sizes and on where a word was p, never on integers, keys or other words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "field/field.h"
#include "pads/aes.h"

namespace tsqp {

// A row whose stream is made.
struct PadRow {
    const AesSchedule* schedule;
    std::uint64_t row;
};

// A row whose stream is there, backed to whole groups of kStreamGroup bytes: for tests, which put words equal
// to p into it.
struct GivenRow {
    const std::uint8_t* stream;
};
inline constexpr std::size_t kStreamGroup = 64;

// `integers` become m centred, within +-(p - 1) / 2. m is memory of the other side, written once by whole
// words of 8 bytes; `copy` gets m too, or is null.
//
//   Shapes:   integers, m, copy [inputs]; inputs is even.
//   Numerics: |integers| < p.
struct MaskArgs {
    std::size_t inputs;
    std::int32_t* integers;
    std::uint32_t* m;
    std::uint32_t* copy;
};

struct PadKernels {
    const char* name;
    // r [inputs], private; inputs < 2^32.
    void (*draw)(const PadRow& row, std::size_t inputs, std::uint32_t* r) noexcept;
    void (*draw_given)(const GivenRow& row, std::size_t inputs, std::uint32_t* r) noexcept;
    // No word is written before its pad is in the field: with a pad of p it would be the integer itself.
    void (*mask)(const PadRow& row, const MaskArgs& args) noexcept;
    void (*mask_given)(const GivenRow& row, const MaskArgs& args) noexcept;
};

extern const PadKernels kScalarPads;  // pads_scalar.cpp: the oracle
#if defined(__x86_64__)
extern const PadKernels kAvx2AesPads;     // pads_avx2aes.cpp: AES-NI
extern const PadKernels kAvx512VaesPads;  // pads_avx512vaes.cpp: VAES
#endif

// What this machine can run, slowest first; scalar is always there.
std::vector<const PadKernels*> supported_pad_kernels();

// What goes with an instruction set that this machine has: of its instructions for AES those that this
// machine has too.
const PadKernels& pad_kernels_of(std::string_view instruction_set);

}  // namespace tsqp
