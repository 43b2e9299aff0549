// 16 lanes as plain loops over 16 floats: what every other instruction set must match, bit for bit.
#pragma once

#include "kernels/lanes.h"

namespace tsqp {
namespace {

struct ScalarLanes {
    struct V {
        float lane[kLanes];
    };

    // How many accumulators of a product stay in registers elsewhere, as rows by blocks of columns.
    static constexpr std::size_t kProductRows = 1, kProductBlocks = 1;

    static float from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
    static std::uint32_t to_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }

    static std::size_t count(Full) { return kLanes; }
    static std::size_t count(Partial part) { return part.count; }

    static float widened(float x) { return x; }
    static float widened(Bf16 x) { return from_bits(std::uint32_t{x} << 16); }
    // UNTRUSTED: only the private copy is used.
    template <class E, class Part>
    static V read(const E* from, Part part) {
        E block[kLanes];
        read_words(block, from, count(part) * sizeof(E));
        V x{};
        for (std::size_t i = 0; i < count(part); ++i) x.lane[i] = widened(block[i]);
        return x;
    }

    static void round_to(float* to, float x) { *to = x != x ? from_bits(0x7FC00000u) : x; }
    static void round_to(Bf16* to, float x) {
        const std::uint32_t bits = to_bits(x);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        *to = static_cast<Bf16>(x != x ? 0x7FC0u : rounded);
    }
    template <class E, class Part>
    static void write(E* to, V x, Part part) {
        E block[kLanes];
        for (std::size_t i = 0; i < kLanes; ++i) round_to(block + i, x.lane[i]);
        write_words(to, block, count(part) * sizeof(E));
    }

    // PRIVATE: load and store.
    template <class Part>
    static V load(const float* from, Part part) {
        V x{};
        for (std::size_t i = 0; i < count(part); ++i) x.lane[i] = from[i];
        return x;
    }
    template <class Part>
    static void store(float* to, V x, Part part) {
        for (std::size_t i = 0; i < count(part); ++i) to[i] = x.lane[i];
    }

    // The even and the odd of 32 elements.
    static void load_pairs(const Bf16* from, V& even, V& odd) {
        for (std::size_t i = 0; i < kLanes; ++i) {
            even.lane[i] = widened(from[2 * i]);
            odd.lane[i] = widened(from[2 * i + 1]);
        }
    }

    // Nearest integers, ties to even, of 0 <= x <= 2^30.
    template <class Part>
    static void store_rounded(std::uint32_t* to, V x, Part part) {
        for (std::size_t i = 0; i < count(part); ++i)
            to[i] = static_cast<std::uint32_t>(
                __builtin_bit_cast(std::uint64_t, static_cast<double>(x.lane[i]) + 0x1.8p52));
    }

    static V opaque(V x) { return x; }
    // x where a < b, else y: also where either is NaN.
    static V select_less(V a, V b, V x, V y) {
        for (std::size_t i = 0; i < kLanes; ++i) y.lane[i] = a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i];
        return y;
    }
    static V select(V x, V other, Between seen) {
        for (std::size_t i = 0; i < kLanes; ++i)
            x.lane[i] = i >= seen.begin && i < seen.end ? x.lane[i] : other.lane[i];
        return x;
    }

    template <class Operation>
    static V each(V a, V b, Operation operation) {
        for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] = operation(a.lane[i], b.lane[i]);
        return a;
    }
    static V set(float x) {
        V v;
        for (std::size_t i = 0; i < kLanes; ++i) v.lane[i] = x;
        return v;
    }
    static V add(V a, V b) {
        return each(a, b, [](float x, float y) { return x + y; });
    }
    static V sub(V a, V b) {
        return each(a, b, [](float x, float y) { return x - y; });
    }
    static V mul(V a, V b) {
        return each(a, b, [](float x, float y) { return x * y; });
    }
    // a * b + c, rounded once.
    static V fma(V a, V b, V c) {
        for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
        return a;
    }
    static V div(V a, V b) {
        return each(a, b, [](float x, float y) { return x / y; });
    }
    // The second operand where either is NaN or both are zero, as maxps.
    static V max(V a, V b) {
        return each(a, b, [](float x, float y) { return x > y ? x : y; });
    }
    // The largest lane; no lane is NaN.
    static float largest(V a) {
        for (std::size_t i = 1; i < kLanes; ++i) a.lane[0] = a.lane[i] > a.lane[0] ? a.lane[i] : a.lane[0];
        return a.lane[0];
    }
    static V negative_abs(V a) {
        return each(a, a, [](float x, float) { return from_bits(to_bits(x) | 0x80000000u); });
    }
    // x * y where x < 0, else x.
    static V mul_where_negative(V x, V y) {
        return each(x, y, [](float a, float b) { return a < 0.0f ? a * b : a; });
    }

    // x * 2^n for integers -150 <= n <= 0 (anything where x is NaN), rounded once: the first product is
    // exact. 0 where a < b.
    static V scale_by_power_of_two(V x, V /*n*/, V biased, V a, V b) {
        for (std::size_t i = 0; i < kLanes; ++i) {
            // Arithmetic modulo 2^32 throughout; halves are taken on n + 256 >= 0.
            const std::uint32_t n = to_bits(biased.lane[i]) - to_bits(0x1.8p23f) + 256u;
            const std::uint32_t half = n >> 1;
            const float first = from_bits((half - 128u + 127u) << 23);
            const float second = from_bits((n - half - 128u + 127u) << 23);
            x.lane[i] = a.lane[i] < b.lane[i] ? 0.0f : x.lane[i] * first * second;
        }
        return x;
    }
};

}  // namespace

}  // namespace tsqp
