// Products by VPDPBUSD: 64 sums of fours an instruction.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "field/field_impl.h"

namespace tsqp {
namespace {

// Six digit rows with a panel are 24 registers of sums, four of weights and one of digits.
constexpr std::size_t kMostRows = 6;

// The first run over a panel is as fast as weights come from memory: they are asked for this many bytes
// ahead, beyond the panel's end too, so that they come while its results are made, and where the processor's
// own look-ahead ends, with each page.
constexpr std::size_t kAhead = 8192;

// The sums of one digit row with a panel. Named and not an array, which gcc 12 keeps in memory, at half
// speed.
template <std::size_t Rows>
struct Sums : Sums<Rows - 1> {
    __m512i a, b, c, d;
};
template <>
struct Sums<0> {};

struct Weights {
    __m512i a, b, c, d;
    [[gnu::always_inline]] explicit Weights(const std::int8_t* from)
        : a(_mm512_load_si512(from)),
          b(_mm512_load_si512(from + 64)),
          c(_mm512_load_si512(from + 128)),
          d(_mm512_load_si512(from + 192)) {}
};

template <std::size_t Rows>
[[gnu::always_inline]] inline void clear(Sums<Rows>& sums) {
    if constexpr (Rows > 0) {
        clear<Rows - 1>(sums);
        sums.a = sums.b = sums.c = sums.d = _mm512_setzero_si512();
    }
}

template <std::size_t Rows>
[[gnu::always_inline]] inline void add(Sums<Rows>& sums, const std::uint8_t* digits, std::size_t stride,
                                       const Weights& weights) {
    if constexpr (Rows > 0) {
        add<Rows - 1>(sums, digits, stride, weights);
        std::int32_t four;
        __builtin_memcpy(&four, digits + (Rows - 1) * stride, sizeof four);
        const __m512i all = _mm512_set1_epi32(four);
        sums.a = _mm512_dpbusd_epi32(sums.a, all, weights.a);
        sums.b = _mm512_dpbusd_epi32(sums.b, all, weights.b);
        sums.c = _mm512_dpbusd_epi32(sums.c, all, weights.c);
        sums.d = _mm512_dpbusd_epi32(sums.d, all, weights.d);
    }
}

template <std::size_t Rows>
[[gnu::always_inline]] inline void store(const Sums<Rows>& sums, std::uint32_t* to) {
    if constexpr (Rows > 0) {
        store<Rows - 1>(sums, to);
        std::uint32_t* const row = to + (Rows - 1) * kPanelOutputs;
        _mm512_store_si512(row, sums.a);
        _mm512_store_si512(row + 16, sums.b);
        _mm512_store_si512(row + 32, sums.c);
        _mm512_store_si512(row + 48, sums.d);
    }
}

template <std::size_t Rows, bool IsFirst>
void multiply_rows(const MultiplyArgs& args, std::size_t row) {
    Sums<Rows> sums;
    clear<Rows>(sums);
    const std::uint8_t* digits = args.digits + row * args.stride;
    const std::int8_t* weights = args.panel;
    for (std::size_t k = 0; k < args.depth; k += 4) {
        if constexpr (IsFirst)
            for (std::size_t line = 0; line < 4 * kPanelOutputs; line += 64)
                _mm_prefetch(weights + kAhead + line, _MM_HINT_T0);
        add<Rows>(sums, digits + k, args.stride, Weights(weights));
        weights += 4 * kPanelOutputs;
    }
    store<Rows>(sums, args.sums + row * kPanelOutputs);
}

// The last run, of fewer rows than kMostRows.
template <std::size_t Rows, bool IsFirst>
void multiply_rest(const MultiplyArgs& args, std::size_t row) {
    if constexpr (Rows > 0) {
        if (args.rows - row == Rows)
            multiply_rows<Rows, IsFirst>(args, row);
        else
            multiply_rest<Rows - 1, IsFirst>(args, row);
    }
}

void multiply(const MultiplyArgs& args) noexcept {
    if (args.rows < kMostRows) return multiply_rest<kMostRows - 1, true>(args, 0);
    multiply_rows<kMostRows, true>(args, 0);
    std::size_t row = kMostRows;
    for (; args.rows - row >= kMostRows; row += kMostRows) multiply_rows<kMostRows, false>(args, row);
    multiply_rest<kMostRows - 1, false>(args, row);
}

}  // namespace

constinit const FieldKernels kAvx512VnniField = field_kernels("avx512vnni", multiply);

}  // namespace tsqp
