#include "products/terms.h"

#include <bit>

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

Bf16 narrowed(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<Bf16>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

float widened(Bf16 bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

}  // namespace

void split_into_terms(const float* from, std::size_t elements, Bf16* to) {
    for (std::size_t block = 0; block < elements;
         block += kTermBlock, from += kTermBlock, to += 2 * kTermBlock)
        for (std::size_t i = 0; i < kTermBlock; ++i) {
            const Bf16 first = narrowed(from[i]);
            to[i] = first;
            const bool is_finite = (first & 0x7F80) != 0x7F80;
            to[kTermBlock + i] = is_finite ? narrowed(from[i] - widened(first)) : Bf16{0};
        }
}

void round_to_bf16(const float* from, std::size_t elements, Bf16* to) {
    for (std::size_t i = 0; i < elements; ++i) to[i] = narrowed(from[i]);
}

void widen(const Bf16* from, std::size_t elements, float* to) {
    for (std::size_t i = 0; i < elements; ++i) to[i] = widened(from[i]);
}

std::vector<std::int32_t> blocks_of_terms(std::size_t depth) {
    std::vector<std::int32_t> blocks;
    for (std::size_t block = 0; block < depth / kTermBlock; ++block)
        blocks.insert(blocks.end(), 2, static_cast<std::int32_t>(block));
    return blocks;
}

}  // namespace tsqp
