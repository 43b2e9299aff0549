// Products by VPDPBUSD: 64 sums of fours an instruction.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
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

// Adds all products of `Rows` digit rows with a panel.
template <std::size_t Rows, bool IsFirst, class Args>
[[gnu::always_inline]] inline void sum_up(Sums<Rows>& sums, const Args& args, std::size_t row) {
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
}

template <std::size_t Rows, bool IsFirst>
void multiply_rows(const MultiplyArgs& args, std::size_t row) {
    Sums<Rows> sums;
    sum_up<Rows, IsFirst>(sums, args, row);
    store<Rows>(sums, args.sums + row * kPanelOutputs);
}

// y of 16 outputs, |y| < p, out of the sums of a row's two digits.
[[gnu::always_inline]] inline __m512i pair(__m512i low, __m512i high, const std::int32_t* column_sums) {
    // gcc 12 would store the sums at each step of their loop, for what follows it.
    asm("" : "+v"(low), "+v"(high));
    const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(column_sums), 15);
    const __m512i y = _mm512_sub_epi32(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8)), offset);
    return _mm512_mask_add_epi32(y, _mm512_movepi32_mask(y), y, _mm512_set1_epi32(kPrime));
}

template <std::size_t Rows>
[[gnu::always_inline]] inline void put_pairs(const Sums<Rows>& sums, const PairsArgs& args, std::size_t row) {
    if constexpr (Rows > 0) {
        put_pairs<Rows - 2>(sums, args, row);
        const Sums<Rows - 1>& low = sums;
        std::uint32_t* const to = args.out + (row + Rows / 2 - 1) * args.out_stride;
        _mm512_storeu_si512(to, pair(low.a, sums.a, args.column_sums));
        _mm512_storeu_si512(to + 16, pair(low.b, sums.b, args.column_sums + 16));
        _mm512_storeu_si512(to + 32, pair(low.c, sums.c, args.column_sums + 32));
        _mm512_storeu_si512(to + 48, pair(low.d, sums.d, args.column_sums + 48));
    }
}

// Not inlined: the offsets would be held in registers from one run to the next, and sums in memory for it.
template <std::size_t Rows, bool IsFirst>
[[gnu::noinline]] void multiply_pairs_of(const PairsArgs& args, std::size_t row) {
    Sums<2 * Rows> sums;
    sum_up<2 * Rows, IsFirst>(sums, args, 2 * row);
    put_pairs<2 * Rows>(sums, args, row);
}

void multiply_pairs(const PairsArgs& args) noexcept {
    constexpr std::size_t kMostPairs = kMostRows / 2;
    static_assert(kMostPairs == 3);
    std::size_t row = 0;
    if (args.rows >= kMostPairs) {
        multiply_pairs_of<kMostPairs, true>(args, 0);
        for (row = kMostPairs; args.rows - row >= kMostPairs; row += kMostPairs)
            multiply_pairs_of<kMostPairs, false>(args, row);
    }
    const std::size_t rest = args.rows - row;
    if (rest == 2) row == 0 ? multiply_pairs_of<2, true>(args, row) : multiply_pairs_of<2, false>(args, row);
    if (rest == 1) row == 0 ? multiply_pairs_of<1, true>(args, row) : multiply_pairs_of<1, false>(args, row);
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

constinit const FieldKernels kAvx512VnniField = field_kernels("avx512vnni", multiply, multiply_pairs);

}  // namespace tsqp
