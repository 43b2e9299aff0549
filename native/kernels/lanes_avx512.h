// 16 lanes as one AVX-512 register (F, BW, DQ, VL), with or without AVX512_BF16.
#pragma once

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/lanes.h"

namespace tsqp {
namespace {

struct Avx512Lanes {
    using V = __m512;

    // How many accumulators of a product stay in registers, as rows by blocks of columns.
    static constexpr std::size_t kProductRows = 4, kProductBlocks = 4;

    static __mmask16 lanes(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
    // One bit for each word that holds one of `count` elements.
    template <class E>
    static __mmask8 words(std::size_t count) {
        return static_cast<__mmask8>((1u << (count * sizeof(E) + kWordBytes - 1) / kWordBytes) - 1u);
    }

    static V opaque(V x) {
        asm("" : "+v"(x));
        return x;
    }
    static V widened(__m256i bits) {
        asm("" : "+v"(bits));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    // UNTRUSTED: the empty asm makes what was read opaque, so that the compiler cannot read it a second time.
    static V read(const float* from, Full) { return opaque(_mm512_loadu_ps(from)); }
    static V read(const float* from, Partial part) {
        const __m512i bits = _mm512_maskz_loadu_epi64(words<float>(part.count), from);
        return _mm512_maskz_mov_ps(lanes(part.count), opaque(_mm512_castsi512_ps(bits)));
    }
    static V read(const Bf16* from, Full) {
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static V read(const Bf16* from, Partial part) {
        const __m256i bits = _mm256_maskz_loadu_epi64(words<Bf16>(part.count), from);
        return _mm512_maskz_mov_ps(lanes(part.count), widened(bits));
    }

    static V one_nan(V x) {
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_ps(x, is_nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
    }
    static __m256i rounded(V x) {
#ifdef __AVX512BF16__
        // The processor's own conversion flushes denormals and keeps a NaN's payload: rare enough for a
        // branch.
        constexpr int kQuietNan = 0x01, kDenormal = 0x20, kSignallingNan = 0x80;
        if (_mm512_fpclass_ps_mask(x, kQuietNan | kDenormal | kSignallingNan) == 0) [[likely]]
            return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#endif
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i top =
            _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7FC0));
        return _mm512_cvtepi32_epi16(top);
    }
    static void write(float* to, V x, Full) { _mm512_storeu_ps(to, one_nan(x)); }
    static void write(float* to, V x, Partial part) {
        const __m512 elements = _mm512_maskz_mov_ps(lanes(part.count), one_nan(x));
        _mm512_mask_storeu_epi64(to, words<float>(part.count), _mm512_castps_si512(elements));
    }
    static void write(Bf16* to, V x, Full) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(x));
    }
    static void write(Bf16* to, V x, Partial part) {
        const __m256i elements = _mm256_maskz_mov_epi16(lanes(part.count), rounded(x));
        _mm256_mask_storeu_epi64(to, words<Bf16>(part.count), elements);
    }

    // PRIVATE: load and store.
    static V load(const float* from, Full) { return _mm512_loadu_ps(from); }
    static V load(const float* from, Partial part) { return _mm512_maskz_loadu_ps(lanes(part.count), from); }
    static void store(float* to, V x, Full) { _mm512_storeu_ps(to, x); }
    static void store(float* to, V x, Partial part) { _mm512_mask_storeu_ps(to, lanes(part.count), x); }

    // The even and the odd of 32 elements.
    static void load_pairs(const Bf16* from, V& even, V& odd) {
        const __m512i bits = _mm512_loadu_si512(from);
        even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
    }

    // Nearest integers, ties to even, of 0 <= x <= 2^30.
    static void store_rounded(std::uint32_t* to, V x, Full) {
        _mm512_storeu_si512(to, _mm512_cvtps_epi32(x));
    }
    static void store_rounded(std::uint32_t* to, V x, Partial part) {
        _mm512_mask_storeu_epi32(to, lanes(part.count), _mm512_cvtps_epi32(x));
    }

    // x where a < b, else y: also where either is NaN.
    static V select_less(V a, V b, V x, V y) {
        return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
    }
    static V select(V x, V other, Between seen) {
        const auto inside = static_cast<__mmask16>(lanes(seen.end) & ~lanes(seen.begin));
        return _mm512_mask_mov_ps(other, inside, x);
    }

    static V set(float x) { return _mm512_set1_ps(x); }
    static V add(V a, V b) { return _mm512_add_ps(a, b); }
    static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
    static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V div(V a, V b) { return _mm512_div_ps(a, b); }
    // The second operand where either is NaN or both are zero.
    static V max(V a, V b) { return _mm512_max_ps(a, b); }
    // The largest lane; no lane is NaN.
    static float largest(V a) { return _mm512_reduce_max_ps(a); }
    static V negative_abs(V a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
    // x * y where x < 0, else x.
    static V mul_where_negative(V x, V y) {
        return _mm512_mask_mul_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), x, y);
    }

    // x * 2^n for integers n, rounded once; 0 where a < b.
    static V scale_by_power_of_two(V x, V n, V /*biased*/, V a, V b) {
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x, n);
    }
};

}  // namespace

}  // namespace tsqp
