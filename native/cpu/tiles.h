// What configures the tiles of AMX for 32 x 32 sums in four of them. For files that are compiled for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace tsqp {
namespace {  // kernels of several instruction sets compile it: see kernels_impl.h

constexpr std::size_t kTileRows = 16, kTileBytes = 64;

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums, upper rows left and right, lower rows left and right. 4 and 5: the upper and lower rows
// of the left-hand side. 6 and 7: the left and right columns of the right-hand side.
void configure_tiles(std::size_t upper_rows, std::size_t lower_rows) {
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

}  // namespace
}  // namespace tsqp
