// Checks over registers of 256 bits.

#include <immintrin.h>

#include "field/check_impl.h"

namespace tsqp {
namespace {

struct Avx2Check {
    using Integers = __m256i;
    using Floats = __m256;
    static constexpr std::size_t kWidth = 8;

    // UNTRUSTED: the empty asm makes what was read opaque, so that the compiler cannot read it a second time.
    static Integers read(const std::uint32_t* from) {
        Integers words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        asm("" : "+x"(words));
        return words;
    }
    static void write(std::uint32_t* to, Integers words) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
    }

    // PRIVATE: load and store.
    static Integers load(const std::int32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Floats load(const float* from) { return _mm256_loadu_ps(from); }
    static void store(std::int32_t* to, Integers x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
    }
    static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }

    static Integers prime() { return _mm256_set1_epi32(kPrime); }
    static Integers zero() { return _mm256_setzero_si256(); }
    static Integers max(Integers a, Integers b) { return _mm256_max_epu32(a, b); }
    static Integers centred(Integers words) {
        // words <= (p - 1) / 2, as the smaller of both is then the word.
        const Integers half = _mm256_set1_epi32(kPrime / 2);
        const Integers is_lower = _mm256_cmpeq_epi32(_mm256_min_epu32(words, half), words);
        return _mm256_sub_epi32(words, _mm256_andnot_si256(is_lower, prime()));
    }
    // As field.h has it.
    static Integers reduced(Integers x) { return _mm256_min_epu32(x, _mm256_sub_epi32(x, prime())); }
    static Integers residues(Integers integers) {
        return _mm256_add_epi32(integers, _mm256_and_si256(_mm256_srai_epi32(integers, 31), prime()));
    }

    static Floats set(float x) { return _mm256_set1_ps(x); }
    static Floats to_floats(Integers x) { return _mm256_cvtepi32_ps(x); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static Floats one_nan(Floats x) {
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), is_nan);
    }

    // Of 64 bits a lane: products of the even lanes, and the odd ones in their place.
    static Integers mul_even(Integers a, Integers b) { return _mm256_mul_epi32(a, b); }
    static Integers odd(Integers x) { return _mm256_srli_epi64(x, 32); }
    static Integers add_wide(Integers a, Integers b) { return _mm256_add_epi64(a, b); }
    // The empty asm keeps gcc from summing several steps as a tree, for which there are no registers.
    static Integers kept(Integers x) {
        asm("" : "+x"(x));
        return x;
    }
    // The same modulo p, within +-2^34: of a shift that knows no sign, less what it makes of the sign.
    static Integers folded(Integers x) {
        const Integers low = _mm256_and_si256(x, _mm256_set1_epi64x(kPrime));
        const Integers sign = _mm256_set1_epi64x(1ll << 32);
        const Integers high = _mm256_srli_epi64(x, 31);
        return _mm256_add_epi64(low, _mm256_sub_epi64(_mm256_xor_si256(high, sign), sign));
    }
    static std::int64_t sum_wide(Integers x) {
        alignas(32) std::int64_t lanes[4];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
        return lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }

    static Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
    static Integers mul_pairs(Integers a, Integers b) { return _mm256_madd_epi16(a, b); }
    // PRIVATE: four outputs with four inputs, the outputs side by side, as 16 bits.
    static Integers four_weights(const std::int8_t* from) {
        const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
        const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
    }
    static Integers four_digits(const std::int16_t* digits) {
        long long four;
        __builtin_memcpy(&four, digits, sizeof four);
        return _mm256_set1_epi64x(four);
    }
};

}  // namespace

constinit const CheckKernels kAvx2Check = Checks<Avx2Check>::kernels("avx2");

}  // namespace tsqp
