// 16 lanes as two AVX2 registers. FMA only where the oracle has it: elsewhere it would round once where that
// rounds twice.
#pragma once

#include <immintrin.h>

#include "kernels/lanes.h"

namespace tsqp {
namespace {

struct Avx2Lanes {
    struct V {
        __m256 low, high;
    };

    // How many accumulators of a product stay in registers, as rows by blocks of columns.
    static constexpr std::size_t kProductRows = 2, kProductBlocks = 2;

    // UNTRUSTED: the empty asm makes what was read opaque, so that the compiler cannot read it a second time;
    // of whole words only a private copy is used.
    static __m256i four_words(const void* from) {
        __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(from));
        asm("" : "+x"(bits));
        return bits;
    }
    static V read(const float* from, Full) {
        return {_mm256_castsi256_ps(four_words(from)), _mm256_castsi256_ps(four_words(from + 8))};
    }
    static V read(const Bf16* from, Full) {
        const __m256i bits = four_words(from);
        const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(bits));
        const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(bits, 1));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
    }
    template <class E>
    static V read(const E* from, Partial part) {
        alignas(32) E block[kLanes] = {};
        read_words(block, from, part.count * sizeof(E));
        return read(block, Full{});
    }

    static __m256 one_nan(__m256 x) {
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), is_nan);
    }
    static __m256i rounded(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), is_nan);
    }
    static void write(float* to, V x, Full) { store(to, {one_nan(x.low), one_nan(x.high)}, Full{}); }
    static void write(Bf16* to, V x, Full) {
        // packus works within 128-bit halves; the permutation puts the quarters back in order.
        const __m256i packed = _mm256_packus_epi32(rounded(x.low), rounded(x.high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xD8));
    }
    template <class E>
    static void write(E* to, V x, Partial part) {
        alignas(32) E block[kLanes];
        write(block, x, Full{});
        write_words(to, block, part.count * sizeof(E));
    }

    // PRIVATE: load and store.
    static V load(const float* from, Full) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static V load(const float* from, Partial part) {
        alignas(32) float block[kLanes] = {};
        for (std::size_t i = 0; i < part.count; ++i) block[i] = from[i];
        return load(block, Full{});
    }
    static void store(float* to, V x, Full) {
        _mm256_storeu_ps(to, x.low);
        _mm256_storeu_ps(to + 8, x.high);
    }
    static void store(float* to, V x, Partial part) {
        alignas(32) float block[kLanes];
        store(block, x, Full{});
        for (std::size_t i = 0; i < part.count; ++i) to[i] = block[i];
    }

    // The even and the odd of 32 elements.
    static void load_pairs(const Bf16* from, V& even, V& odd) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + kLanes));
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
        even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
        odd = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)),
               _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
    }

    // Nearest integers, ties to even, of 0 <= x <= 2^30.
    static void store_rounded(std::uint32_t* to, V x, Full) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtps_epi32(x.low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_cvtps_epi32(x.high));
    }
    static void store_rounded(std::uint32_t* to, V x, Partial part) {
        alignas(32) std::uint32_t block[kLanes];
        store_rounded(block, x, Full{});
        for (std::size_t i = 0; i < part.count; ++i) to[i] = block[i];
    }

    static V opaque(V x) {
        asm("" : "+x"(x.low), "+x"(x.high));
        return x;
    }
    // x where a < b, else y: also where either is NaN.
    static V select_less(V a, V b, V x, V y) {
        return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
    }
    static __m256 select(__m256 x, __m256 other, __m256i lane, Between seen) {
        const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(seen.begin)), lane);
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(seen.end)), lane);
        return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_andnot_si256(before, inside)));
    }
    static V select(V x, V other, Between seen) {
        const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
        return {select(x.low, other.low, low, seen), select(x.high, other.high, high, seen)};
    }

    static V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static V sub(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static V mul(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static V fma(V a, V b, V c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static V div(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    // The second operand where either is NaN or both are zero.
    static V max(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    // The largest lane; no lane is NaN.
    static float largest(V a) {
        const __m256 eight = _mm256_max_ps(a.low, a.high);
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
    }
    static V negative_abs(V a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_or_ps(a.low, sign), _mm256_or_ps(a.high, sign)};
    }
    // x * y where x < 0, else x: blendv looks at the sign alone, and -0 * y is -0.
    static V mul_where_negative(V x, V y) {
        return {_mm256_blendv_ps(x.low, _mm256_mul_ps(x.low, y.low), x.low),
                _mm256_blendv_ps(x.high, _mm256_mul_ps(x.high, y.high), x.high)};
    }

    // x * 2^n for integers -150 <= n <= 0 (anything where x is NaN), rounded once: the first product is
    // exact. 0 where a < b.
    static __m256 scale_by_power_of_two(__m256 x, __m256 biased) {
        const __m256i bias = _mm256_castps_si256(_mm256_set1_ps(0x1.8p23f));
        const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(biased), bias);
        const __m256i half = _mm256_srai_epi32(n, 1);
        const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
        const __m256i first = _mm256_add_epi32(one, _mm256_slli_epi32(half, 23));
        const __m256i second = _mm256_add_epi32(one, _mm256_slli_epi32(_mm256_sub_epi32(n, half), 23));
        return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
    }
    static V scale_by_power_of_two(V x, V /*n*/, V biased, V a, V b) {
        const __m256 low = _mm256_andnot_ps(_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), x.low);
        const __m256 high = _mm256_andnot_ps(_mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ), x.high);
        return {scale_by_power_of_two(low, biased.low), scale_by_power_of_two(high, biased.high)};
    }
};

}  // namespace

}  // namespace tsqp
