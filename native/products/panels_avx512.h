// What the AVX-512 and the tile kernels share: sums to results, with a bias, behind a column mask.
#pragma once

// gcc's own headers start from registers that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "products/panels.h"

namespace tsqp {
namespace {

struct PanelStore {
    __m512 low_bias, high_bias;
    __mmask32 mask;
    bool is_f32;

    // The last panel of N columns may be partial.
    PanelStore(const PanelArgs& a, std::size_t panel) : is_f32(a.out_is_f32) {
        const std::size_t first = panel * kPanelColumns, left = a.columns - first;
        mask = left >= kPanelColumns ? ~__mmask32{0} : static_cast<__mmask32>((1u << left) - 1);
        low_bias = high_bias = _mm512_setzero_ps();
        if (a.bias != nullptr) {
            const __m512i bits = _mm512_maskz_loadu_epi16(mask, a.bias + first);
            low_bias = widened(_mm512_castsi512_si256(bits));
            high_bias = widened(_mm512_extracti64x4_epi64(bits, 1));
        }
    }

    static __m512 widened(__m256i bits) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    void operator()(void* to, __m512 low, __m512 high) const {
        low = _mm512_add_ps(low, low_bias);
        high = _mm512_add_ps(high, high_bias);
        if (is_f32) {
            _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), low);
            _mm512_mask_storeu_ps(static_cast<float*>(to) + 16, static_cast<__mmask16>(mask >> 16), high);
        } else {
            _mm512_mask_storeu_epi16(to, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
};

// What a sum takes of a pair of B's rows and of a row's two elements: bf16 by the dot-product instruction, f32 by
// a multiply-add for each half of the pair, widened. A processor that does two multiply-adds in the time of one
// dot product takes no longer for that.
inline __m512 add_pair(__m512 sum, __m512i pair, const std::uint16_t* x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, x, sizeof bits);
    const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(bits)));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pair), both);
}

inline __m512 add_pair(__m512 sum, __m512i pair, const float* x) {
    const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 second =
        _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
    sum = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0]), sum);
    return _mm512_fmadd_ps(second, _mm512_set1_ps(x[1]), sum);
}

// Rows of few: a panel is read once for all of them, so this is bound by memory. Four sums a column for one
// row, since a sum is ready for its next pair only some cycles later.
template <class Element, std::size_t Rows>
[[gnu::always_inline]] inline void panel_of_rows(const PanelArgs& a, std::size_t panel, std::size_t row,
                                                 const PanelStore& store) {
    constexpr std::size_t kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
    const Element* x = row_of<Element>(a, row);
    __m512 low[Rows][kChains], high[Rows][kChains];
    for (std::size_t r = 0; r < Rows; ++r)
        for (std::size_t c = 0; c < kChains; ++c) low[r][c] = high[r][c] = _mm512_setzero_ps();
    for (std::size_t begin = 0; begin < a.depth; begin = end_of_block(a, begin)) {
        const std::uint16_t* weights = block_of(a, panel, begin);
        const std::size_t end = end_of_block(a, begin);
        for (std::size_t k = begin; k < end; k += 2 * kChains) {
            for (std::size_t c = 0; c < kChains; ++c) {
                const std::uint16_t* pair = weights + (k - begin + 2 * c) * kPanelColumns;
                _mm_prefetch(reinterpret_cast<const char*>(pair + 4096), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(pair + 4096 + 32), _MM_HINT_T0);
                const __m512i w_low = _mm512_loadu_si512(pair);
                const __m512i w_high = _mm512_loadu_si512(pair + kPanelColumns);
                for (std::size_t r = 0; r < Rows; ++r) {
                    const Element* two = x + r * a.a_stride + k + 2 * c;
                    low[r][c] = add_pair(low[r][c], w_low, two);
                    high[r][c] = add_pair(high[r][c], w_high, two);
                }
            }
        }
    }
    for (std::size_t r = 0; r < Rows; ++r) {
        for (std::size_t c = 1; c < kChains; ++c) {
            low[r][0] = _mm512_add_ps(low[r][0], low[r][c]);
            high[r][0] = _mm512_add_ps(high[r][0], high[r][c]);
        }
        store(results_of(a, row + r, panel), low[r][0], high[r][0]);
    }
}

// All rows, a few at a time.
template <class Element>
void product_of_rows(const PanelArgs& a, std::size_t begin, std::size_t end) {
    for (std::size_t panel = begin; panel < end; ++panel) {
        const PanelStore store(a, panel);
        std::size_t row = 0;
        for (; row + 8 <= a.rows; row += 8) panel_of_rows<Element, 8>(a, panel, row, store);
        if (row + 4 <= a.rows) {
            panel_of_rows<Element, 4>(a, panel, row, store);
            row += 4;
        }
        switch (a.rows - row) {
            case 1:
                panel_of_rows<Element, 1>(a, panel, row, store);
                break;
            case 2:
                panel_of_rows<Element, 2>(a, panel, row, store);
                break;
            case 3:
                panel_of_rows<Element, 3>(a, panel, row, store);
                break;
            default:
                break;
        }
    }
}

}  // namespace
}  // namespace tsqp
