// Pads over registers of 512 bits, four blocks each.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "pads/pads_impl.h"

namespace tsqp {
namespace {

struct Avx512VaesLanes {
    using Words = __m512i;
    using Blocks = __m512i;
    // Eight registers keep two units for AES busy: a round takes four cycles or less.
    static constexpr std::size_t kWidth = 16, kRegisters = 8;

    static Blocks key(const AesSchedule& schedule, std::size_t round) {
        return _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(schedule.rounds[round])));
    }
    // What a counter block has beside its number, under the first key.
    static Blocks start(const PadRow& row) {
        const long long high = static_cast<long long>(__builtin_bswap64(row.row));
        const __m128i block = _mm_bslli_si128(_mm_cvtsi64_si128(high), 4);
        return _mm512_xor_si512(_mm512_broadcast_i32x4(block), key(*row.schedule, 0));
    }
    // Four blocks under the first key; their numbers are first + later and the next three, each in its
    // block's last word.
    static Blocks begun(Blocks start, std::uint32_t first, int later) {
        const __m512i in_order =
            _mm512_setr_epi32(0, 0, 0, later, 0, 0, 0, later + 1, 0, 0, 0, later + 2, 0, 0, 0, later + 3);
        const __m512i numbers =
            _mm512_maskz_add_epi32(0x8888, in_order, _mm512_set1_epi32(static_cast<int>(first)));
        const __m512i big_endian =
            _mm512_broadcast_i32x4(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
        return _mm512_xor_si512(start, _mm512_shuffle_epi8(numbers, big_endian));
    }
    static Blocks round(Blocks state, Blocks key) { return _mm512_aesenc_epi128(state, key); }
    static Blocks last_round(Blocks state, Blocks key) { return _mm512_aesenclast_epi128(state, key); }

    static Words words(Blocks state) { return state; }

    static void write(std::uint32_t* to, Words words) { _mm512_storeu_si512(to, words); }
    static void write_some(std::uint32_t* to, Words words, std::size_t count) {
        _mm512_mask_storeu_epi64(to, static_cast<__mmask8>((1u << (count / 2)) - 1), words);
    }

    static Words load(const std::int32_t* from) { return _mm512_loadu_si512(from); }
    static Words load_some(const std::int32_t* from, std::size_t count) {
        return _mm512_maskz_loadu_epi32(lanes(count), from);
    }
    static void store(std::int32_t* to, Words words) { _mm512_storeu_si512(to, words); }
    static void store_some(std::int32_t* to, Words words, std::size_t count) {
        _mm512_mask_storeu_epi32(to, lanes(count), words);
    }

    static Words zero() { return _mm512_setzero_si512(); }
    static Words prime() { return _mm512_set1_epi32(kPrime); }
    static Words and_(Words a, Words b) { return _mm512_and_si512(a, b); }
    static Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
    static Words sub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
    static Words min(Words a, Words b) { return _mm512_min_epu32(a, b); }
    static Words max(Words a, Words b) { return _mm512_max_epu32(a, b); }
    static bool has_prime(Words words) { return _mm512_cmpeq_epi32_mask(words, prime()) != 0; }
    static Words centred(Words words) {
        const __mmask16 is_upper = _mm512_cmpgt_epu32_mask(words, _mm512_set1_epi32(kPrime / 2));
        return _mm512_mask_sub_epi32(words, is_upper, words, prime());
    }

  private:
    static __mmask16 lanes(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace

constinit const PadKernels kAvx512VaesPads = Pads<Avx512VaesLanes>::kernels("avx512vaes");

}  // namespace tsqp
