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

void result(const ResultArgs& args) noexcept {
    std::uint32_t sums[kPanelOutputs];
    for (std::size_t c = 0; c < kPanelOutputs; ++c)
        sums[c] = args.digits[0][c] - args.offset * static_cast<std::uint32_t>(args.column_sums[c]);
    for (std::size_t d = 1; d < args.num_digits; ++d) {
        const std::uint32_t* const digit = args.digits[d];
        for (std::size_t c = 0; c < kPanelOutputs; ++c) sums[c] += digit[c] << (8 * d);
    }
    float results[kPanelOutputs];
    for (std::size_t c = 0; c < kPanelOutputs; ++c)
        results[c] = static_cast<float>(static_cast<std::int32_t>(sums[c])) * (args.scales[c] / args.scale);
    if (args.bias != nullptr)
        for (std::size_t c = 0; c < kPanelOutputs; ++c) results[c] = results[c] + args.bias[c];
    for (std::size_t c = 0; c < args.columns; ++c)
        args.out[c] = results[c] != results[c] ? __builtin_bit_cast(float, 0x7FC00000) : results[c];
}

constexpr FieldKernels field_kernels(const char* name, void (*multiply)(const MultiplyArgs&) noexcept) {
    return {name,
            largest_bits,
            quantise,
            sum_of_squares,
            write_digit,
            quantise_weights<float>,
            quantise_weights<std::uint16_t>,
            multiply,
            result};
}

}  // namespace
}  // namespace tsqp
