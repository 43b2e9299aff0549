// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "bench/peak.h"

namespace tsqp {
namespace {

std::uint64_t first_of(__m512i lanes) {
    alignas(64) std::uint64_t words[8];
    _mm512_store_si512(words, lanes);
    return words[0];
}

// Twelve sums cover the instruction's latency at two a cycle.
std::uint64_t dot_products(std::uint64_t steps) noexcept {
    const __m512i digits = _mm512_set1_epi32(0x01020304), weights = _mm512_set1_epi32(0x05060708);
    __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0,
            s8 = s0, s9 = s0, s10 = s0, s11 = s0;
    for (std::uint64_t step = 0; step < steps; ++step)
        asm("vpdpbusd %13, %12, %0\n\tvpdpbusd %13, %12, %1\n\tvpdpbusd %13, %12, %2\n\t"
            "vpdpbusd %13, %12, %3\n\tvpdpbusd %13, %12, %4\n\tvpdpbusd %13, %12, %5\n\t"
            "vpdpbusd %13, %12, %6\n\tvpdpbusd %13, %12, %7\n\tvpdpbusd %13, %12, %8\n\t"
            "vpdpbusd %13, %12, %9\n\tvpdpbusd %13, %12, %10\n\tvpdpbusd %13, %12, %11"
            : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8),
              "+v"(s9), "+v"(s10), "+v"(s11)
            : "v"(digits), "v"(weights));
    const __m512i all = _mm512_add_epi32(
        _mm512_add_epi32(_mm512_add_epi32(s0, s1), _mm512_add_epi32(s2, s3)),
        _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(s4, s5), _mm512_add_epi32(s6, s7)),
                         _mm512_add_epi32(_mm512_add_epi32(s8, s9), _mm512_add_epi32(s10, s11))));
    return first_of(all);
}

}  // namespace

constinit const Peak kVnniPeak{12 * 64, dot_products};

std::uint64_t read_lines(const std::int8_t* from, std::size_t size_bytes) noexcept {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (std::size_t at = 0; at < size_bytes; at += 256) {
        a = _mm512_xor_si512(a, _mm512_load_si512(from + at));
        b = _mm512_xor_si512(b, _mm512_load_si512(from + at + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(from + at + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(from + at + 192));
    }
    const __m512i all = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    return first_of(all);
}

}  // namespace tsqp
