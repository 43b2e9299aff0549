// Products of panels with tile instructions: 32 x 32 sums in four tiles.

#include "cpu/tiles.h"
#include "products/panels_avx512.h"

namespace tsqp {
namespace {

constexpr std::size_t kTileFloats = kTileRows * 16;

template <bool Lower>
[[gnu::always_inline]] inline void block(const PanelArgs& a, std::size_t panel, std::size_t row,
                                         std::size_t upper_rows, std::size_t lower_rows,
                                         const PanelStore& store, float* so_far, bool first) {
    const std::uint16_t* upper = row_of<std::uint16_t>(a, row);
    const std::uint16_t* lower = upper + 16 * a.a_stride;
    const std::size_t a_bytes = a.a_stride * 2;
    constexpr std::size_t kPairBytes = kPanelColumns * 4;
    // The TEE read these lines last: they come over while the sums are made (docs/performance.md).
    if (a.is_last)
        for (std::size_t r = 0; r < upper_rows + lower_rows; ++r)
            asm volatile("prefetchw %0" ::"m"(*static_cast<std::uint16_t*>(results_of(a, row + r, panel))));
    if (a.is_first) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Lower) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, so_far, kTileBytes);
        _tile_loadd(1, so_far + kTileFloats, kTileBytes);
        if constexpr (Lower) {
            _tile_loadd(2, so_far + 2 * kTileFloats, kTileBytes);
            _tile_loadd(3, so_far + 3 * kTileFloats, kTileBytes);
        }
    }
    for (std::size_t begin = 0; begin < a.depth; begin = end_of_block(a, begin)) {
        const std::uint16_t* weights = block_of(a, panel, begin);
        const std::size_t end = end_of_block(a, begin);
        for (std::size_t k = begin; k < end; k += kDepthBlock) {
            // And it wrote these; after the first panel they are here.
            if (first)
                for (std::size_t r = 0; r < upper_rows + lower_rows; ++r)
                    _mm_prefetch(upper + r * a.a_stride + k + 2 * kDepthBlock, _MM_HINT_T0);
            _tile_loadd(6, weights + (k - begin) * kPanelColumns, kPairBytes);
            _tile_loadd(4, upper + k, a_bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, weights + (k - begin) * kPanelColumns + 32, kPairBytes);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (Lower) {
                _tile_loadd(5, lower + k, a_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    alignas(64) float whole[4 * kTileFloats];
    float* const sums = a.is_last ? whole : so_far;
    _tile_stored(0, sums, kTileBytes);
    _tile_stored(1, sums + kTileFloats, kTileBytes);
    if constexpr (Lower) {
        _tile_stored(2, sums + 2 * kTileFloats, kTileBytes);
        _tile_stored(3, sums + 3 * kTileFloats, kTileBytes);
    }
    if (!a.is_last) return;
    const auto sum = [&](std::size_t tile, std::size_t r) {
        return _mm512_load_ps(whole + tile * kTileFloats + r * 16);
    };
    for (std::size_t r = 0; r < upper_rows; ++r) store(results_of(a, row + r, panel), sum(0, r), sum(1, r));
    if constexpr (Lower)
        for (std::size_t r = 0; r < lower_rows; ++r)
            store(results_of(a, row + 16 + r, panel), sum(2, r), sum(3, r));
}

void product(const PanelArgs& a, std::size_t begin, std::size_t end) noexcept {
    // Tiles take bf16 alone.
    if (a.a_is_f32) return product_of_rows<float>(a, begin, end);
    const std::size_t whole = a.rows / 32 * 32, rest = a.rows - whole;
    const auto so_far = [&](std::size_t panel, std::size_t row) {
        return a.sums == nullptr ? nullptr
                                 : a.sums + sums_elements(a.rows, panel - begin) + row * kPanelColumns;
    };
    if (whole > 0) {
        configure_tiles(16, 16);
        for (std::size_t panel = begin; panel < end; ++panel) {
            const PanelStore store(a, panel);
            for (std::size_t row = 0; row < whole; row += 32)
                block<true>(a, panel, row, 16, 16, store, so_far(panel, row), panel == begin);
        }
    }
    if (rest > 0) {
        const std::size_t upper = rest < 16 ? rest : 16, lower = rest - upper;
        configure_tiles(upper, lower);
        for (std::size_t panel = begin; panel < end; ++panel) {
            const PanelStore store(a, panel);
            if (lower > 0)
                block<true>(a, panel, whole, upper, lower, store, so_far(panel, whole), false);
            else
                block<false>(a, panel, whole, upper, 0, store, so_far(panel, whole), false);
        }
    }
    _tile_release();
}

}  // namespace

constinit const PanelKernels kAmxPanels{"amx", true, product};

}  // namespace tsqp
