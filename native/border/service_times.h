// When a wait may sleep before it looks: a long operation leaves the core to the threads that compute it.
//
// A thread that yields between looks still takes its fair share of a core that it has to share, which on two
// cores was a quarter of what the GPU process could have had (docs/performance.md). So an operation that is
// expected to last is slept through in part. What is expected is what this side has seen; a peer that changes
// its pace costs at most kMaxNapNs an operation.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <vector>

namespace tsqp {

// A timer of a virtual machine is late by some 60 us: shorter waits are not worth one, and the rest is left
// for it.
inline constexpr std::uint64_t kShortestWaitNs = 300'000;
inline constexpr double kNapShare = 0.7;
inline constexpr std::uint64_t kNapMarginNs = 50'000;
inline constexpr std::uint64_t kMaxNapNs = 5'000'000;
// What was there when it was looked for had been there for an unknown time.
inline constexpr std::uint64_t kAtOnceNs = 20'000;

// Learns how long operations last, by operation and magnitude, in nanoseconds for each byte that they are
// handed. Moments are those of one clock that does not go back.
class ServiceTimes {
  public:
    // How long to sleep before looking for the completion of the oldest submission; 0: not at all.
    std::uint64_t nap_ns(std::size_t operation, std::uint64_t size_bytes, std::uint64_t submitted_ns,
                         std::uint64_t now_ns) const {
        if (operation >= ns_per_byte_.size()) return 0;
        const double known = ns_per_byte_[operation][magnitude(size_bytes)];
        const double passed_ns = static_cast<double>(now_ns - std::max(submitted_ns, completed_ns_));
        const double left_ns = known * static_cast<double>(size_bytes) - passed_ns;
        if (left_ns < static_cast<double>(kShortestWaitNs)) return 0;
        const double nap = left_ns * kNapShare - static_cast<double>(kNapMarginNs);
        return static_cast<std::uint64_t>(std::min(nap, static_cast<double>(kMaxNapNs)));
    }

    // Learns from a completion that was looked for since looked_ns and seen at now_ns.
    void completed(std::size_t operation, std::uint64_t size_bytes, std::uint64_t submitted_ns, bool napped,
                   std::uint64_t looked_ns, std::uint64_t now_ns) {
        const std::uint64_t began_ns = std::max(submitted_ns, completed_ns_);
        completed_ns_ = now_ns;
        if (operation >= ns_per_byte_.size()) ns_per_byte_.resize(operation + 1);
        double& known = ns_per_byte_[operation][magnitude(size_bytes)];
        const double found = static_cast<double>(now_ns - began_ns) /
                             static_cast<double>(std::max<std::uint64_t>(size_bytes, 1));
        // What was found at once lasted less long; after a nap, the nap was too long.
        if (now_ns - looked_ns < kAtOnceNs)
            known = std::min(known, found) * (napped ? 0.9 : 1.0);
        else
            known = known == 0 ? found : known + (found - known) / 4;
    }

  private:
    static std::size_t magnitude(std::uint64_t size_bytes) {
        return static_cast<std::size_t>(std::bit_width(size_bytes));
    }

    // 0: not known yet.
    std::vector<std::array<double, 65>> ns_per_byte_;
    std::uint64_t completed_ns_ = 0;
};

}  // namespace tsqp
