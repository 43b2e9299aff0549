// Products by TDPBUSD: 32 digit rows with 32 outputs in four tiles.

// gcc 12 takes the don't-care operand of its own intrinsics for an uninitialised variable (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "field/field_impl.h"

namespace tsqp {
namespace {

constexpr std::size_t kTileRows = 16, kTileBytes = 64;

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums, upper digit rows left and right, lower ones left and right. 4 and 5: the upper and
// lower digits. 6 and 7: the left and right weights.
void configure(std::size_t upper_rows, std::size_t lower_rows) {
    TileConfig config;
    const auto set = [&](std::size_t tile, std::size_t rows) {
        config.rows[tile] = static_cast<std::uint8_t>(rows);
        config.row_bytes[tile] = kTileBytes;
    };
    for (const std::size_t tile : {0, 1, 4}) set(tile, upper_rows);
    for (const std::size_t tile : {2, 3, 5}) set(tile, lower_rows == 0 ? upper_rows : lower_rows);
    for (const std::size_t tile : {6, 7}) set(tile, kTileRows);
    // The compiler's own intrinsic names eight bytes as its operand, and the stores of the others are
    // dropped.
    asm volatile("ldtilecfg %0" ::"m"(config));
}

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
        configure(kTileRows, kTileRows);
        for (std::size_t row = 0; row < pairs; row += 2 * kTileRows) whole<true>(args, row);
    }
    if (rest > kTileRows) {
        configure(kTileRows, rest - kTileRows);
        whole<true>(args, pairs);
    } else if (rest > 0) {
        configure(rest, 0);
        whole<false>(args, pairs);
    }
    _tile_release();
}

}  // namespace

constinit const FieldKernels kAmxField = field_kernels("amx", multiply);

}  // namespace tsqp
