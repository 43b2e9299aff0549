// The counter-based random generator of the sampler: the same key and counter give the same numbers, whatever
// was drawn before.
#pragma once

#include <array>
#include <cstdint>

namespace tsqp {

// Philox4x64-10: four words of 64 bits for a key of two words and a counter of four.
//
//   Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
//   numpy.random.Philox
//           is the same function; it counts up before its first block.
inline std::array<std::uint64_t, 4> philox(std::array<std::uint64_t, 2> key,
                                           std::array<std::uint64_t, 4> counter) {
    constexpr std::uint64_t kFactors[] = {0xD2E7470EE14C6C93u, 0xCA5A826395121157u};
    constexpr std::uint64_t kSteps[] = {0x9E3779B97F4A7C15u, 0xBB67AE8584CAA73Bu};
    constexpr int kRounds = 10;
    for (int round = 0; round < kRounds; ++round) {
        const auto first = static_cast<unsigned __int128>(kFactors[0]) * counter[0];
        const auto second = static_cast<unsigned __int128>(kFactors[1]) * counter[2];
        counter = {static_cast<std::uint64_t>(second >> 64) ^ counter[1] ^ key[0],
                   static_cast<std::uint64_t>(second),
                   static_cast<std::uint64_t>(first >> 64) ^ counter[3] ^ key[1],
                   static_cast<std::uint64_t>(first)};
        key = {key[0] + kSteps[0], key[1] + kSteps[1]};
    }
    return counter;
}

}  // namespace tsqp
