// Checks over registers of 512 bits. Products by VPMULDQ: the halves of VPMADD52 would be as many
// instructions.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "field/check_impl.h"

namespace tsqp {
namespace {

struct Avx512Check {
    using Integers = __m512i;
    using Floats = __m512;
    static constexpr std::size_t kWidth = 16;

    // UNTRUSTED: the empty asm makes what was read opaque, so that the compiler cannot read it a second time.
    static Integers read(const std::uint32_t* from) {
        Integers words = _mm512_loadu_si512(from);
        asm("" : "+v"(words));
        return words;
    }
    static void write(std::uint32_t* to, Integers words) { _mm512_storeu_si512(to, words); }

    // PRIVATE: load and store.
    static Integers load(const std::int32_t* from) { return _mm512_loadu_si512(from); }
    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(std::int32_t* to, Integers x) { _mm512_storeu_si512(to, x); }
    static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

    static Integers prime() { return _mm512_set1_epi32(kPrime); }
    static Integers zero() { return _mm512_setzero_si512(); }
    static Integers max(Integers a, Integers b) { return _mm512_max_epu32(a, b); }
    static Integers centred(Integers words) {
        const __mmask16 is_upper = _mm512_cmpgt_epu32_mask(words, _mm512_set1_epi32(kPrime / 2));
        return _mm512_mask_sub_epi32(words, is_upper, words, prime());
    }
    // As field.h has it.
    static Integers reduced(Integers x) { return _mm512_min_epu32(x, _mm512_sub_epi32(x, prime())); }
    static Integers residues(Integers integers) {
        return _mm512_mask_add_epi32(integers, _mm512_movepi32_mask(integers), integers, prime());
    }

    static Floats set(float x) { return _mm512_set1_ps(x); }
    static Floats to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats one_nan(Floats x) {
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_ps(x, is_nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
    }

    // Of 64 bits a lane: products of the even lanes, and the odd ones in their place.
    static Integers mul_even(Integers a, Integers b) { return _mm512_mul_epi32(a, b); }
    static Integers odd(Integers x) { return _mm512_srli_epi64(x, 32); }
    static Integers add_wide(Integers a, Integers b) { return _mm512_add_epi64(a, b); }
    // The empty asm keeps gcc from summing several steps as a tree, for which there are no registers.
    static Integers kept(Integers x) {
        asm("" : "+v"(x));
        return x;
    }
    // The same modulo p, within +-2^33.
    static Integers folded(Integers x) {
        return _mm512_add_epi64(_mm512_and_si512(x, _mm512_set1_epi64(kPrime)), _mm512_srai_epi64(x, 31));
    }
    static std::int64_t sum_wide(Integers x) { return _mm512_reduce_add_epi64(x); }

    static Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
    static Integers mul_pairs(Integers a, Integers b) { return _mm512_madd_epi16(a, b); }
    // PRIVATE: four outputs with eight inputs, the outputs side by side, as 16 bits.
    static Integers four_weights(const std::int8_t* from) {
        const __m128i* const fours = reinterpret_cast<const __m128i*>(from);
        const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_load_si128(fours)),
                                                      _mm_load_si128(fours + kPanelOutputs / 4), 1);
        const __m256i order =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        return _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(bytes, order));
    }
    static Integers four_digits(const std::int16_t* digits) {
        long long four;
        __builtin_memcpy(&four, digits, sizeof four);
        return _mm512_set1_epi64(four);
    }
};

}  // namespace

constinit const CheckKernels kAvx512Check = Checks<Avx512Check>::kernels("avx512");

}  // namespace tsqp
