// The loops of field.h that any compiler makes vectors of; each field_<isa>.cpp compiles them with its flags.
//
// Everything is in an anonymous namespace, and nothing of std is called: see kernels_impl.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "field/field.h"

namespace tsqp {
namespace {

inline float widened(float x) { return x; }
inline float widened(std::uint16_t bf16) { return __builtin_bit_cast(float, std::uint32_t{bf16} << 16); }

// Nearest integer of |x| < 2^31, ties to even.
inline std::int32_t nearest(float x) {
#if defined(__SSE4_1__)
    return static_cast<std::int32_t>(__builtin_rintf(x));
#else
    // NOTE(numerics): the sum rounds to an integer, whose low 32 bits are the sum's own.
    const auto bits = __builtin_bit_cast(std::uint64_t, static_cast<double>(x) + 0x1.8p52);
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(bits));
#endif
}

template <class E>
inline std::uint32_t largest_of(const E* x, std::size_t size) {
    std::int32_t largest = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const std::int32_t bits = __builtin_bit_cast(std::int32_t, widened(x[i])) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return static_cast<std::uint32_t>(largest);
}

std::uint32_t largest_bits(const float* x, std::size_t size) noexcept { return largest_of(x, size); }

Magnitudes quantise(const float* x, std::size_t size, float scale, std::int32_t* integers) noexcept {
    // Sums of this many fit 32 bits.
    constexpr std::size_t kBlock = 256;
    std::int32_t largest = 0;
    std::uint64_t sum = 0;
    for (std::size_t begin = 0; begin < size; begin += kBlock) {
        const std::size_t end = size - begin < kBlock ? size : begin + kBlock;
        std::uint32_t of_block = 0;
        for (std::size_t i = begin; i < end; ++i) {
            const std::int32_t integer = nearest(x[i] * scale);
            integers[i] = integer;
            const std::int32_t magnitude = integer < 0 ? -integer : integer;
            largest = magnitude > largest ? magnitude : largest;
            of_block += static_cast<std::uint32_t>(magnitude);
        }
        sum += of_block;
    }
    return {static_cast<std::uint32_t>(largest), sum};
}

Magnitudes centre(const std::uint32_t* m, std::size_t size, std::int32_t* integers) noexcept {
    // Sums of this many fit 32 bits while none is above kThreeDigits.
    constexpr std::size_t kBlock = 256;
    constexpr auto kPrimeSigned = static_cast<std::int32_t>(kPrime);
    std::int32_t largest = 0;
    std::uint64_t sum = 0;
    for (std::size_t begin = 0; begin < size; begin += kBlock) {
        const std::size_t end = size - begin < kBlock ? size : begin + kBlock;
        std::uint32_t of_block = 0;
        for (std::size_t i = begin; i < end; ++i) {
            // Twice, as a word may be 2 p or 2 p + 1.
            const auto element = static_cast<std::int32_t>(reduced(reduced(m[i])));
            const std::int32_t integer = element > kPrimeSigned / 2 ? element - kPrimeSigned : element;
            integers[i] = integer;
            const std::int32_t magnitude = integer < 0 ? -integer : integer;
            largest = magnitude > largest ? magnitude : largest;
            of_block += static_cast<std::uint32_t>(magnitude);
        }
        sum += of_block;
    }
    return {static_cast<std::uint32_t>(largest), sum};
}

std::uint64_t sum_of_squares(const std::int32_t* integers, std::size_t size) noexcept {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < size; ++i)
        sum += static_cast<std::uint64_t>(std::int64_t{integers[i]} * integers[i]);
    return sum;
}

void write_digit(const std::int32_t* integers, std::size_t size, std::uint32_t offset, unsigned shift,
                 std::uint8_t* digits) noexcept {
    for (std::size_t i = 0; i < size; ++i)
        digits[i] = static_cast<std::uint8_t>((static_cast<std::uint32_t>(integers[i]) + offset) >> shift);
}

template <class E>
WeightRow quantise_weights(const E* weight, std::size_t size, std::int8_t* to) noexcept {
    constexpr std::uint32_t kInfinityBits = 0x7F800000;
    const std::uint32_t bits = largest_of(weight, size);
    if (bits >= kInfinityBits) return {0.0f, 0, 0, false};
    float scale = __builtin_bit_cast(float, bits) / 127.0f;
    if (scale == 0.0f) scale = 1.0f;
    std::int32_t sum = 0;
    std::uint32_t squares = 0;
    for (std::size_t i = 0; i < size; ++i) {
        std::int32_t integer = nearest(widened(weight[i]) / scale);
        // Only a scale that is denormal, and so has lost digits, lets one out of the bounds.
        integer = integer > 127 ? 127 : integer < -127 ? -127 : integer;
        to[i] = static_cast<std::int8_t>(integer);
        sum += integer;
        squares += static_cast<std::uint32_t>(integer * integer);
    }
    return {scale, sum, squares, true};
}

// One loop over the outputs, so that a compiler keeps it in registers: the digits are unrolled by template.
template <std::size_t Digits, bool Bias>
[[gnu::always_inline]] inline void results(const ResultArgs& args, std::size_t columns) {
    const std::uint32_t* const __restrict d0 = args.digits[0];
    const std::uint32_t* const __restrict d1 = args.digits[Digits > 1 ? 1 : 0];
    const std::uint32_t* const __restrict d2 = args.digits[Digits > 2 ? 2 : 0];
    const std::uint32_t* const __restrict d3 = args.digits[Digits > 3 ? 3 : 0];
    const std::int32_t* const __restrict column_sums = args.column_sums;
    const float* const __restrict scales = args.scales;
    const float* const __restrict bias = args.bias;
    float* const __restrict out = args.out;
    const std::uint32_t offset = args.offset;
    const float scale = args.scale;
    for (std::size_t c = 0; c < columns; ++c) {
        std::uint32_t sum = d0[c] - offset * static_cast<std::uint32_t>(column_sums[c]);
        if constexpr (Digits > 1) sum += d1[c] << 8;
        if constexpr (Digits > 2) sum += d2[c] << 16;
        if constexpr (Digits > 3) sum += d3[c] << 24;
        float result = static_cast<float>(static_cast<std::int32_t>(sum)) * (scales[c] / scale);
        if constexpr (Bias) result = result + bias[c];
        out[c] = result != result ? __builtin_bit_cast(float, 0x7FC00000) : result;
    }
}

template <std::size_t Digits>
inline void results(const ResultArgs& args) {
    // A whole panel is the rule: its loop has a known length.
    const bool is_whole = args.columns == kPanelOutputs;
    if (args.bias == nullptr)
        is_whole ? results<Digits, false>(args, kPanelOutputs) : results<Digits, false>(args, args.columns);
    else
        is_whole ? results<Digits, true>(args, kPanelOutputs) : results<Digits, true>(args, args.columns);
}

void result(const ResultArgs& args) noexcept {
    switch (args.num_digits) {
        case 1:
            return results<1>(args);
        case 2:
            return results<2>(args);
        case 3:
            return results<3>(args);
        default:
            return results<4>(args);
    }
}

// y, put together in 32 bits, as |y| < p.
template <std::size_t Digits>
inline std::uint32_t narrow_residue(const std::uint32_t (&sums)[kMaxDigits], std::int32_t column_sum) {
    std::uint32_t sum = sums[0] - digit_offset(Digits) * static_cast<std::uint32_t>(column_sum);
    for (std::size_t d = 1; d < Digits; ++d) sum += sums[d] << (8 * d);
    return static_cast<std::int32_t>(sum) < 0 ? sum + kPrime : sum;
}

// y, put together in 64 bits: each sum of a digit row is one of 32 bits with a sign, and so |y| < 2^56.
template <std::size_t Digits>
inline std::uint32_t wide_residue(const std::uint32_t (&sums)[kMaxDigits], std::int32_t column_sum) {
    std::uint64_t sum = std::uint64_t{kPrime} << 26;
    for (std::size_t d = 0; d < Digits; ++d)
        sum += static_cast<std::uint64_t>(std::int64_t{static_cast<std::int32_t>(sums[d])}) << (8 * d);
    sum -= static_cast<std::uint64_t>(std::int64_t{column_sum}) << (8 * Digits - 1);
    // 2^31 = 1 mod p: from 58 bits to 32, then to p at most.
    sum = (sum & kPrime) + (sum >> 31);
    sum = (sum & kPrime) + (sum >> 31);
    return reduced(static_cast<std::uint32_t>(sum));
}

template <std::size_t Digits, bool IsNarrow>
[[gnu::always_inline]] inline void residues(const ResidueArgs& args, std::size_t columns) {
    const std::uint32_t* const __restrict d0 = args.digits[0];
    const std::uint32_t* const __restrict d1 = args.digits[Digits > 1 ? 1 : 0];
    const std::uint32_t* const __restrict d2 = args.digits[Digits > 2 ? 2 : 0];
    const std::uint32_t* const __restrict d3 = args.digits[Digits > 3 ? 3 : 0];
    const std::int32_t* const __restrict column_sums = args.column_sums;
    std::uint32_t* const __restrict out = args.out;
    for (std::size_t c = 0; c < columns; ++c) {
        const std::uint32_t sums[kMaxDigits] = {d0[c], d1[c], d2[c], d3[c]};
        out[c] = IsNarrow ? narrow_residue<Digits>(sums, column_sums[c])
                          : wide_residue<Digits>(sums, column_sums[c]);
    }
}

template <std::size_t Digits>
inline void residues(const ResidueArgs& args) {
    const bool is_whole = args.columns == kPanelOutputs;
    if (args.is_narrow)
        is_whole ? residues<Digits, true>(args, kPanelOutputs) : residues<Digits, true>(args, args.columns);
    else
        is_whole ? residues<Digits, false>(args, kPanelOutputs) : residues<Digits, false>(args, args.columns);
}

void residue(const ResidueArgs& args) noexcept {
    switch (args.num_digits) {
        case 1:
            return residues<1>(args);
        case 2:
            return residues<2>(args);
        case 3:
            return residues<3>(args);
        default:
            return residues<4>(args);
    }
}

constexpr FieldKernels field_kernels(const char* name, void (*multiply)(const MultiplyArgs&) noexcept,
                                     void (*multiply_pairs)(const PairsArgs&) noexcept = nullptr) {
    return {name,
            largest_bits,
            quantise,
            centre,
            sum_of_squares,
            write_digit,
            quantise_weights<float>,
            quantise_weights<std::uint16_t>,
            multiply,
            result,
            residue,
            multiply_pairs};
}

}  // namespace
}  // namespace tsqp
