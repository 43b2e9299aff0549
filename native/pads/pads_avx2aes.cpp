// Pads over registers of 128 bits, a block each: AES-NI has no wider ones.

#include <immintrin.h>

#include "border/words.h"
#include "pads/pads_impl.h"

namespace tsqp {
namespace {

struct Avx2AesLanes {
    using Words = __m128i;
    static constexpr std::size_t kWidth = 4;

    static Words key(const AesSchedule& schedule, std::size_t round) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(schedule.rounds[round]));
    }
    // What a counter block has beside its number, under the first key.
    static Words start(const PadRow& row) {
        const long long high = static_cast<long long>(__builtin_bswap64(row.row));
        return _mm_xor_si128(_mm_bslli_si128(_mm_cvtsi64_si128(high), 4), key(*row.schedule, 0));
    }
    // The number of a block, in its last word.
    static Words numbers(std::uint32_t first) { return _mm_setr_epi32(0, 0, 0, static_cast<int>(first)); }
    static Words later(Words numbers, int blocks) {
        return _mm_add_epi32(numbers, _mm_setr_epi32(0, 0, 0, blocks));
    }
    static Words begun(Words start, Words numbers) {
        const __m128i big_endian = _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12);
        return _mm_xor_si128(start, _mm_shuffle_epi8(numbers, big_endian));
    }
    static Words round(Words state, Words key) { return _mm_aesenc_si128(state, key); }
    static Words last_round(Words state, Words key) { return _mm_aesenclast_si128(state, key); }

    static void write(std::uint32_t* to, Words words) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
    }
    static void write_some(std::uint32_t* to, Words words, std::size_t count) {
        std::int32_t lanes[kWidth];
        store(lanes, words);
        write_words(to, lanes, count * sizeof *lanes);
    }

    static Words load(const std::int32_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static Words load_some(const std::int32_t* from, std::size_t count) {
        std::int32_t lanes[kWidth] = {};
        __builtin_memcpy(lanes, from, count * sizeof *lanes);
        return load(lanes);
    }
    static void store(std::int32_t* to, Words words) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
    }
    static void store_some(std::int32_t* to, Words words, std::size_t count) {
        std::int32_t lanes[kWidth];
        store(lanes, words);
        __builtin_memcpy(to, lanes, count * sizeof *lanes);
    }

    static Words zero() { return _mm_setzero_si128(); }
    static Words prime() { return _mm_set1_epi32(kPrime); }
    static Words and_(Words a, Words b) { return _mm_and_si128(a, b); }
    static Words add(Words a, Words b) { return _mm_add_epi32(a, b); }
    static Words sub(Words a, Words b) { return _mm_sub_epi32(a, b); }
    static Words min(Words a, Words b) { return _mm_min_epu32(a, b); }
    static Words max(Words a, Words b) { return _mm_max_epu32(a, b); }
    static bool has_prime(Words words) { return _mm_movemask_epi8(_mm_cmpeq_epi32(words, prime())) != 0; }
    static Words centred(Words words) {
        // words <= (p - 1) / 2, as the smaller of both is then the word.
        const Words is_lower = _mm_cmpeq_epi32(_mm_min_epu32(words, _mm_set1_epi32(kPrime / 2)), words);
        return _mm_sub_epi32(words, _mm_andnot_si128(is_lower, prime()));
    }
};

}  // namespace

constinit const PadKernels kAvx2AesPads = Pads<Avx2AesLanes>::kernels("avx2aes");

}  // namespace tsqp
