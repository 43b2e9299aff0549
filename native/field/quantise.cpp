#include "field/quantise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace tsqp {
namespace {

// The largest f32 whose product with `largest` is at most `bound`.
float scale_to(std::uint32_t bound, float largest) {
    constexpr float kMost = std::numeric_limits<float>::max();
    const float scale = std::min(static_cast<float>(bound) / largest, kMost);
    // NOTE(numerics): exact, as 24 times 24 bits fit 53; the quotient was rounded once, so it is one step off
    // at most.
    const bool is_more = static_cast<double>(scale) * static_cast<double>(largest) > bound;
    return is_more ? std::nextafter(scale, 0.0f) : scale;
}

}  // namespace

std::uint64_t squares_limit(std::uint32_t squares) {
    constexpr std::uint64_t kLimit = std::uint64_t{kSumLimit} * kSumLimit - 1;
    return squares == 0 ? std::numeric_limits<std::uint64_t>::max() : kLimit / squares;
}

QuantisedRow quantise_row(const FieldKernels& kernels, const float* x, std::size_t inputs,
                          std::uint64_t limit, std::int32_t* integers) {
    constexpr std::uint32_t kInfinityBits = 0x7F800000;
    const std::uint32_t bits = kernels.largest_bits(x, inputs);
    if (bits == 0 || bits >= kInfinityBits) {
        std::fill_n(integers, inputs, 0);
        return {bits == 0 ? 1.0f : std::numeric_limits<float>::quiet_NaN(), 2};
    }
    const float largest = std::bit_cast<float>(bits);
    float scale = scale_to(kTwoDigits, largest);
    Magnitudes magnitudes = kernels.quantise(x, inputs, scale, integers);
    if (inputs * std::uint64_t{magnitudes.largest} > 256 * magnitudes.sum) {
        scale = scale_to(kThreeDigits, largest);
        magnitudes = kernels.quantise(x, inputs, scale, integers);
    }
    while (127 * magnitudes.sum >= kSumLimit && kernels.sum_of_squares(integers, inputs) > limit) {
        scale *= 0.5f;
        magnitudes = kernels.quantise(x, inputs, scale, integers);
    }
    return {scale, magnitudes.largest > kTwoDigits ? std::size_t{3} : std::size_t{2}};
}

}  // namespace tsqp
