// Pads over registers of 256 bits, two blocks each, which AES-NI takes one by one.

#include <immintrin.h>

#include "border/words.h"
#include "pads/pads_impl.h"

namespace tsqp {
namespace {

struct Avx2AesLanes {
    using Words = __m256i;
    struct Blocks {
        __m128i first, second;
    };
    // Eight blocks keep two units for AES busy: a round takes four cycles or less.
    static constexpr std::size_t kWidth = 8, kRegisters = 4;

    static __m128i key(const AesSchedule& schedule, std::size_t round) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(schedule.rounds[round]));
    }
    // What a counter block has beside its number, under the first key.
    static Blocks start(const PadRow& row) {
        const long long high = static_cast<long long>(__builtin_bswap64(row.row));
        const __m128i block =
            _mm_xor_si128(_mm_bslli_si128(_mm_cvtsi64_si128(high), 4), key(*row.schedule, 0));
        return {block, block};
    }
    // Two blocks under the first key; their numbers are first + later and the next, each in its block's last
    // word.
    static Blocks begun(Blocks start, std::uint32_t first, int later) {
        const auto block = [first](int after) {
            const __m128i number = _mm_setr_epi32(0, 0, 0, static_cast<int>(first) + after);
            return _mm_shuffle_epi8(number,
                                    _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
        };
        return {_mm_xor_si128(start.first, block(later)), _mm_xor_si128(start.second, block(later + 1))};
    }
    static Blocks round(Blocks state, __m128i key) {
        return {_mm_aesenc_si128(state.first, key), _mm_aesenc_si128(state.second, key)};
    }
    static Blocks last_round(Blocks state, __m128i key) {
        return {_mm_aesenclast_si128(state.first, key), _mm_aesenclast_si128(state.second, key)};
    }
    static Words words(Blocks state) { return _mm256_set_m128i(state.second, state.first); }

    static void write(std::uint32_t* to, Words words) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
    }
    static void write_some(std::uint32_t* to, Words words, std::size_t count) {
        std::int32_t lanes[kWidth];
        store(lanes, words);
        write_words(to, lanes, count * sizeof *lanes);
    }

    static Words load(const std::int32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static Words load_some(const std::int32_t* from, std::size_t count) {
        std::int32_t lanes[kWidth] = {};
        __builtin_memcpy(lanes, from, count * sizeof *lanes);
        return load(lanes);
    }
    static void store(std::int32_t* to, Words words) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
    }
    static void store_some(std::int32_t* to, Words words, std::size_t count) {
        std::int32_t lanes[kWidth];
        store(lanes, words);
        __builtin_memcpy(to, lanes, count * sizeof *lanes);
    }

    static Words zero() { return _mm256_setzero_si256(); }
    static Words prime() { return _mm256_set1_epi32(kPrime); }
    static Words and_(Words a, Words b) { return _mm256_and_si256(a, b); }
    static Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
    static Words sub(Words a, Words b) { return _mm256_sub_epi32(a, b); }
    static Words min(Words a, Words b) { return _mm256_min_epu32(a, b); }
    static Words max(Words a, Words b) { return _mm256_max_epu32(a, b); }
    static bool has_prime(Words words) {
        return _mm256_movemask_epi8(_mm256_cmpeq_epi32(words, prime())) != 0;
    }
    static Words centred(Words words) {
        // words <= (p - 1) / 2, as the smaller of both is then the word.
        const Words is_lower =
            _mm256_cmpeq_epi32(_mm256_min_epu32(words, _mm256_set1_epi32(kPrime / 2)), words);
        return _mm256_sub_epi32(words, _mm256_andnot_si256(is_lower, prime()));
    }
};

}  // namespace

constinit const PadKernels kAvx2AesPads = Pads<Avx2AesLanes>::kernels("avx2aes");

}  // namespace tsqp
