// Products of panels with AVX2 and FMA: a pair is widened to two f32, and takes two multiply-adds.

#include <immintrin.h>

#include "products/panels.h"

namespace tsqp {
namespace {

constexpr std::size_t kLanes = 8, kParts = kPanelColumns / kLanes;

float widened(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float x;
    __builtin_memcpy(&x, &wide, sizeof x);
    return x;
}

std::uint16_t narrowed(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return x != x ? std::uint16_t{0x7FC0}
                  : static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float widened(float x) { return x; }

template <class Element, std::size_t Rows>
void panel_of_rows(const PanelArgs& a, std::size_t panel, std::size_t row) {
    const Element* x = row_of<Element>(a, row);
    __m256 sums[Rows][kParts];
    for (auto& of_row : sums)
        for (__m256& sum : of_row) sum = _mm256_setzero_ps();
    const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    for (std::size_t begin = 0; begin < a.depth; begin = end_of_block(a, begin)) {
        const std::uint16_t* weights = block_of(a, panel, begin);
        const std::size_t end = end_of_block(a, begin);
        for (std::size_t k = begin; k < end; k += 2)
            for (std::size_t part = 0; part < kParts; ++part) {
                const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                    weights + (k - begin) * kPanelColumns + part * 2 * kLanes));
                const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
                const __m256 second = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper_half));
                for (std::size_t r = 0; r < Rows; ++r) {
                    const Element* at = x + r * a.a_stride + k;
                    sums[r][part] = _mm256_fmadd_ps(_mm256_set1_ps(widened(at[0])), first, sums[r][part]);
                    sums[r][part] = _mm256_fmadd_ps(_mm256_set1_ps(widened(at[1])), second, sums[r][part]);
                }
            }
    }
    const std::size_t column = panel * kPanelColumns, left = a.columns - column;
    for (std::size_t r = 0; r < Rows; ++r) {
        alignas(32) float lanes[kPanelColumns];
        for (std::size_t part = 0; part < kParts; ++part)
            _mm256_store_ps(lanes + part * kLanes, sums[r][part]);
        void* out = results_of(a, row + r, panel);
        for (std::size_t c = 0; c < (left < kPanelColumns ? left : kPanelColumns); ++c) {
            const float sum = a.bias == nullptr ? lanes[c] : lanes[c] + widened(a.bias[column + c]);
            if (a.out_is_f32)
                static_cast<float*>(out)[c] = sum;
            else
                static_cast<std::uint16_t*>(out)[c] = narrowed(sum);
        }
    }
}

template <class Element>
void product_of(const PanelArgs& a, std::size_t begin, std::size_t end) {
    for (std::size_t panel = begin; panel < end; ++panel) {
        std::size_t row = 0;
        for (; row + 2 <= a.rows; row += 2) panel_of_rows<Element, 2>(a, panel, row);
        if (row < a.rows) panel_of_rows<Element, 1>(a, panel, row);
    }
}

void product(const PanelArgs& a, std::size_t begin, std::size_t end) noexcept {
    if (a.a_is_f32)
        product_of<float>(a, begin, end);
    else
        product_of<std::uint16_t>(a, begin, end);
}

}  // namespace

constinit const PanelKernels kAvx2Panels{"avx2", false, product};

}  // namespace tsqp
