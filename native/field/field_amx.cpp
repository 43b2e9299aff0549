// Products by TDPBUSD: 32 digit rows with 32 outputs in four tiles.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/tiles.h"
#include "field/field_impl.h"

namespace tsqp {
namespace {

// Half a panel: 32 of its outputs.
template <bool Lower>
[[gnu::always_inline]] inline void half(const MultiplyArgs& args, std::size_t row, std::size_t column) {
    const std::uint8_t* const upper = args.digits + row * args.stride;
    const std::uint8_t* const lower = upper + kTileRows * args.stride;
    constexpr std::size_t kFourBytes = kPanelOutputs * 4, kSumBytes = kPanelOutputs * 4;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::size_t k = 0; k < args.depth; k += kDepthOfTile) {
        const std::int8_t* const weights = args.panel + k * kPanelOutputs + column * 4;
        _tile_loadd(6, weights, kFourBytes);
        _tile_loadd(4, upper + k, args.stride);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, weights + kTileBytes, kFourBytes);
        _tile_dpbusd(1, 4, 7);
        if constexpr (Lower) {
            _tile_loadd(5, lower + k, args.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    std::uint32_t* const sums = args.sums + row * kPanelOutputs + column;
    _tile_stored(0, sums, kSumBytes);
    _tile_stored(1, sums + 16, kSumBytes);
    if constexpr (Lower) {
        _tile_stored(2, sums + kTileRows * kPanelOutputs, kSumBytes);
        _tile_stored(3, sums + kTileRows * kPanelOutputs + 16, kSumBytes);
    }
}

template <bool Lower>
void whole(const MultiplyArgs& args, std::size_t row) {
    half<Lower>(args, row, 0);
    half<Lower>(args, row, 32);
}

void multiply(const MultiplyArgs& args) noexcept {
    const std::size_t pairs = args.rows / (2 * kTileRows) * (2 * kTileRows), rest = args.rows - pairs;
    if (pairs > 0) {
        configure_tiles(kTileRows, kTileRows);
        for (std::size_t row = 0; row < pairs; row += 2 * kTileRows) whole<true>(args, row);
    }
    if (rest > kTileRows) {
        configure_tiles(kTileRows, rest - kTileRows);
        whole<true>(args, pairs);
    } else if (rest > 0) {
        configure_tiles(rest, 0);
        whole<false>(args, pairs);
    }
    _tile_release();
}

}  // namespace

constinit const FieldKernels kAmxField = field_kernels("amx", multiply);

}  // namespace tsqp
