// 16 lanes in one AVX-512 register (F, BW, DQ, VL); AVX512_BF16 multiplies and adds 32 bf16 at once.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <type_traits>

#include "few_rows_impl.h"

namespace tsqp {
namespace {

struct Avx512 {
    using V = __m512;
    static constexpr std::size_t width = 16;
    static V zero() { return _mm512_setzero_ps(); }
    static V splat(float x) { return _mm512_set1_ps(x); }
    static V load(const float* from) { return _mm512_loadu_ps(from); }
    static V load(const Bf16* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static V madd(V a, V b, V sum) { return _mm512_fmadd_ps(a, b, sum); }
    static void store(float* to, V x) { _mm512_storeu_ps(to, x); }
    static void store(Bf16* to, V x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i top =
            _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7FC0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(top));
    }
    template <class E>
    static constexpr std::size_t step = std::is_same_v<E, Bf16> ? 32 : 16;
    static V dot(const float* x, const float* weight, V sum) { return madd(load(x), load(weight), sum); }
    static V dot(const Bf16* x, const Bf16* weight, V sum) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)),
                                reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight)));
    }
    static float total(V x) { return _mm512_reduce_add_ps(x); }
};

}  // namespace

constinit const FewRowsKernels kAvx512Bf16FewRows{FewRows<Avx512, Bf16>::table(),
                                                  FewRows<Avx512, float>::table()};

}  // namespace tsqp
#pragma GCC diagnostic pop
