#include <immintrin.h>

#include "bench/peak.h"

namespace tsqp {
namespace {

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The products' own four tiles of sums, which the instruction needs to be busy.
std::uint64_t tile_products(std::uint64_t steps) noexcept {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (std::uint64_t step = 0; step < steps; ++step) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    alignas(64) std::uint32_t sums[16 * 16];
    _tile_stored(0, sums, 64);
    _tile_release();
    return sums[0];
}

}  // namespace

constinit const Peak kTilePeak{4 * 16 * 16 * 64, tile_products};

}  // namespace tsqp
