// Products by VPMADDWD on bytes widened to 16 bits, whose sums of pairs are exact.

#include <immintrin.h>

#include "field/field_impl.h"

namespace tsqp {
namespace {

// The sums of one digit row with 16 outputs. Named and not an array, which gcc 12 keeps in memory.
template <std::size_t Rows>
struct Sums : Sums<Rows - 1> {
    __m256i low, high;
};
template <>
struct Sums<0> {};

// Bytes 0 and 2 of each four, and bytes 1 and 3, as signed 16 bits.
struct Fours {
    __m256i even, odd;
    explicit Fours(const std::int8_t* weights) {
        const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights));
        even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
        odd = _mm256_srai_epi16(bytes, 8);
    }
    [[gnu::always_inline]] __m256i with(__m256i even_digits, __m256i odd_digits) const {
        return _mm256_add_epi32(_mm256_madd_epi16(even, even_digits), _mm256_madd_epi16(odd, odd_digits));
    }
};

template <std::size_t Rows>
[[gnu::always_inline]] inline void clear(Sums<Rows>& sums) {
    if constexpr (Rows > 0) {
        clear<Rows - 1>(sums);
        sums.low = sums.high = _mm256_setzero_si256();
    }
}

template <std::size_t Rows>
[[gnu::always_inline]] inline void add(Sums<Rows>& sums, const std::uint8_t* digits, std::size_t stride,
                                       const Fours& low, const Fours& high) {
    if constexpr (Rows > 0) {
        add<Rows - 1>(sums, digits, stride, low, high);
        std::int32_t four;
        __builtin_memcpy(&four, digits + (Rows - 1) * stride, sizeof four);
        const __m256i all = _mm256_set1_epi32(four);
        const __m256i even = _mm256_and_si256(all, _mm256_set1_epi16(0xFF)), odd = _mm256_srli_epi16(all, 8);
        sums.low = _mm256_add_epi32(sums.low, low.with(even, odd));
        sums.high = _mm256_add_epi32(sums.high, high.with(even, odd));
    }
}

template <std::size_t Rows>
[[gnu::always_inline]] inline void store(const Sums<Rows>& sums, std::uint32_t* to) {
    if constexpr (Rows > 0) {
        store<Rows - 1>(sums, to);
        auto* const row = reinterpret_cast<__m256i*>(to + (Rows - 1) * kPanelOutputs);
        _mm256_store_si256(row, sums.low);
        _mm256_store_si256(row + 1, sums.high);
    }
}

template <std::size_t Rows>
void multiply_rows(const MultiplyArgs& args, std::size_t row) {
    for (std::size_t column = 0; column < kPanelOutputs; column += 16) {
        Sums<Rows> sums;
        clear<Rows>(sums);
        for (std::size_t k = 0; k < args.depth; k += 4) {
            const std::int8_t* const weights = args.panel + k * kPanelOutputs + column * 4;
            add<Rows>(sums, args.digits + row * args.stride + k, args.stride, Fours(weights),
                      Fours(weights + 32));
        }
        store<Rows>(sums, args.sums + row * kPanelOutputs + column);
    }
}

void multiply(const MultiplyArgs& args) noexcept {
    std::size_t row = 0;
    for (; args.rows - row >= 3; row += 3) multiply_rows<3>(args, row);
    if (args.rows - row == 2) multiply_rows<2>(args, row);
    if (args.rows - row == 1) multiply_rows<1>(args, row);
}

}  // namespace

constinit const FieldKernels kAvx2Field = field_kernels("avx2", multiply);

}  // namespace tsqp
