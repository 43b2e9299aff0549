// What a session's submissions come to: counted here, because counting in Python took longer than a ring's
// write.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tsqp {

// Round trips kept for the percentiles: the newest ones.
inline constexpr std::size_t kRoundTripSamples = 16384;

struct OperationTally {
    std::string name;
    std::uint64_t calls = 0;
    std::uint64_t total_ns = 0;  // as the other side claims it, and no longer than this side saw pass
};

struct Tallies {
    std::vector<OperationTally> operations;
    std::uint64_t doorbells = 0, bytes_to_gpu = 0, bytes_to_tee = 0;
    std::uint64_t waiting_ns = 0;
    // All round trips: how many have so many bits of nanoseconds, and their sum.
    std::array<std::uint64_t, 65> round_trips_by_bits{};
    std::uint64_t round_trips_ns = 0;

    // The number of an operation, which it gets when it is first asked for.
    std::size_t number_of(const std::string& operation) {
        const auto known = std::find_if(operations.begin(), operations.end(),
                                        [&](const OperationTally& tally) { return tally.name == operation; });
        if (known == operations.end()) {
            operations.push_back({operation});
            return operations.size() - 1;
        }
        return static_cast<std::size_t>(known - operations.begin());
    }

    void add_round_trip(std::uint64_t ns) {
        round_trips_[num_round_trips_++ % kRoundTripSamples] = ns;
        ++round_trips_by_bits[static_cast<std::size_t>(std::bit_width(ns))];
        round_trips_ns += ns;
    }

    // The newest round trips first, `most` at most.
    std::vector<std::uint64_t> newest_round_trips(std::size_t most) const {
        std::vector<std::uint64_t> newest(std::min({most, num_round_trips_, kRoundTripSamples}));
        for (std::size_t i = 0; i < newest.size(); ++i)
            newest[i] = round_trips_[(num_round_trips_ - 1 - i) % kRoundTripSamples];
        return newest;
    }

  private:
    std::array<std::uint64_t, kRoundTripSamples> round_trips_{};
    std::size_t num_round_trips_ = 0;
};

}  // namespace tsqp
