// The kernels of few_rows.h over one instruction set's registers.
//
// An Isa has: V, a register of `width` f32; zero(), splat(float), load(from), madd(a, b, sum), store(to, V),
// total(V); and for dot products step<E>, how many elements dot(x, weight, sum) takes at once.
#pragma once

#include <cstdint>
#include <cstring>

#include "few_rows.h"

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

[[maybe_unused]] inline float widened(float x) { return x; }
[[maybe_unused]] inline float widened(Bf16 bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}
[[maybe_unused]] inline void narrow(float x, float* to) { *to = x; }
[[maybe_unused]] inline void narrow(float x, Bf16* to) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *to = x != x ? Bf16{0x7FC0} : static_cast<Bf16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

template <class Isa, class E>
struct FewRows {
    using V = typename Isa::V;
    static constexpr std::size_t width = Isa::width;

    // Outputs x Rows dot products at once: a weight is read once for all rows, an x once for all outputs.
    template <std::size_t Outputs, std::size_t Rows>
    static void dots(const LinearArgs& a, std::size_t output, std::size_t row) {
        const E* weight = static_cast<const E*>(a.weight) + output * a.inputs;
        const E* x = static_cast<const E*>(a.x) + row * a.inputs;
        V sums[Outputs][Rows];
        for (auto& of_output : sums)
            for (V& sum : of_output) sum = Isa::zero();
        constexpr std::size_t step = Isa::template step<E>;
        const std::size_t whole = a.inputs / step * step;
        for (std::size_t i = 0; i < whole; i += step)
            for (std::size_t n = 0; n < Outputs; ++n)
                for (std::size_t m = 0; m < Rows; ++m)
                    sums[n][m] = Isa::dot(x + m * a.inputs + i, weight + n * a.inputs + i, sums[n][m]);
        E* out = static_cast<E*>(a.out) + row * a.outputs + output;
        const E* bias = static_cast<const E*>(a.bias);
        for (std::size_t n = 0; n < Outputs; ++n)
            for (std::size_t m = 0; m < Rows; ++m) {
                float y = Isa::total(sums[n][m]);
                for (std::size_t i = whole; i < a.inputs; ++i)
                    y += widened(x[m * a.inputs + i]) * widened(weight[n * a.inputs + i]);
                if (bias != nullptr) y += widened(bias[output + n]);
                narrow(y, out + m * a.outputs + n);
            }
    }

    static void linear(const LinearArgs& a, std::size_t begin, std::size_t end) noexcept {
        std::size_t output = begin;
        // Four outputs stay in the nearest cache while the rows go over them.
        for (; output + 4 <= end; output += 4) {
            std::size_t row = 0;
            for (; row + 8 <= a.rows; row += 8) {
                dots<2, 8>(a, output, row);
                dots<2, 8>(a, output + 2, row);
            }
            for (; row + 4 <= a.rows; row += 4) dots<4, 4>(a, output, row);
            for (; row < a.rows; ++row) dots<4, 1>(a, output, row);
        }
        for (; output < end; ++output)
            for (std::size_t row = 0; row < a.rows; ++row) dots<1, 1>(a, output, row);
    }

    static void decode_scores(const DecodeScoresArgs& a, std::size_t begin, std::size_t end) noexcept {
        constexpr std::size_t kRegisters = kColumnBlock / width;
        const E* query = static_cast<const E*>(a.query);
        for (std::size_t item = begin; item < end; ++item) {
            const E* keys = static_cast<const E*>(a.keys) + item * kColumnBlock;
            E* out = static_cast<E*>(a.out) + item * kColumnBlock;
            for (std::size_t head = 0; head < a.heads; ++head) {
                V sums[kRegisters];
                for (V& sum : sums) sum = Isa::zero();
                for (std::size_t d = 0; d < a.dim; ++d) {
                    const V q = Isa::splat(widened(query[head * a.dim + d]));
                    for (std::size_t i = 0; i < kRegisters; ++i)
                        sums[i] = Isa::madd(q, Isa::load(keys + d * a.key_stride + i * width), sums[i]);
                }
                for (std::size_t i = 0; i < kRegisters; ++i)
                    Isa::store(out + head * a.columns + i * width, sums[i]);
            }
        }
    }

    // A head's dim goes in chunks of a few registers, whose sums stay in them over all columns.
    template <std::size_t Registers>
    static void context_chunk(const DecodeContextArgs& a, std::size_t head, std::size_t d) {
        const E* probabilities = static_cast<const E*>(a.probabilities) + head * a.columns;
        const E* values = static_cast<const E*>(a.values) + d;
        V sums[Registers];
        for (V& sum : sums) sum = Isa::zero();
        for (std::size_t column = 0; column < a.columns; ++column) {
            const V p = Isa::splat(widened(probabilities[column]));
            for (std::size_t i = 0; i < Registers; ++i)
                sums[i] = Isa::madd(p, Isa::load(values + column * a.dim + i * width), sums[i]);
        }
        E* out = static_cast<E*>(a.out) + head * a.dim + d;
        for (std::size_t i = 0; i < Registers; ++i) Isa::store(out + i * width, sums[i]);
    }

    static void decode_context(const DecodeContextArgs& a) noexcept {
        for (std::size_t head = 0; head < a.heads; ++head) {
            std::size_t d = 0;
            for (; d + 4 * width <= a.dim; d += 4 * width) context_chunk<4>(a, head, d);
            for (; d + width <= a.dim; d += width) context_chunk<1>(a, head, d);
            for (; d < a.dim; ++d) {
                float sum = 0.0f;
                for (std::size_t column = 0; column < a.columns; ++column)
                    sum += widened(static_cast<const E*>(a.probabilities)[head * a.columns + column]) *
                           widened(static_cast<const E*>(a.values)[column * a.dim + d]);
                narrow(sum, static_cast<E*>(a.out) + head * a.dim + d);
            }
        }
    }

    static constexpr FewRowsElementKernels table() { return {linear, decode_scores, decode_context}; }
};

}  // namespace
}  // namespace tsqp
