// 8 lanes in one AVX2 register, with FMA.

#include <immintrin.h>

#include "few_rows_impl.h"

namespace tsqp {
namespace {

struct Avx2 {
    using V = __m256;
    static constexpr std::size_t width = 8;
    static V zero() { return _mm256_setzero_ps(); }
    static V splat(float x) { return _mm256_set1_ps(x); }
    static V load(const float* from) { return _mm256_loadu_ps(from); }
    static V load(const Bf16* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static V madd(V a, V b, V sum) { return _mm256_fmadd_ps(a, b, sum); }
    static void store(float* to, V x) { _mm256_storeu_ps(to, x); }
    static void store(Bf16* to, V x) {
        alignas(32) float lanes[width];
        _mm256_store_ps(lanes, x);
        for (std::size_t i = 0; i < width; ++i) narrow(lanes[i], to + i);
    }
    template <class E>
    static constexpr std::size_t step = width;
    template <class E>
    static V dot(const E* x, const E* weight, V sum) {
        return madd(load(x), load(weight), sum);
    }
    static float total(V x) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

}  // namespace

constinit const FewRowsKernels kAvx2FewRows{FewRows<Avx2, Bf16>::table(), FewRows<Avx2, float>::table()};

}  // namespace tsqp
