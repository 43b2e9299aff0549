#include "cpu/stacked_pages.h"

#include <algorithm>
#include <cstdint>

#include "cpu/pages.h"

namespace tsqp {
namespace {

constexpr std::size_t kPage = 4096, kLargePage = std::size_t{2} << 20;
// What is never touched costs nothing.
constexpr std::size_t kRunBytes = std::size_t{64} << 20;

std::size_t round_up(std::size_t size, std::size_t block) { return (size + block - 1) / block * block; }

struct Run {
    explicit Run(std::size_t size) : size_bytes(size), pages(size + kLargePage, true) {
        const auto address = reinterpret_cast<std::uintptr_t>(pages.data());
        base = pages.data() + (round_up(address, kLargePage) - address);
    }
    std::size_t size_bytes, used_bytes = 0;
    Pages<std::byte> pages;
    std::byte* base;
};

// Weak: a run does not outlive its pieces. Of each thread: no lock that a fork could catch held.
thread_local std::weak_ptr<Run> current;

}  // namespace

std::shared_ptr<std::byte> stacked_pages(std::size_t size_bytes) {
    const std::size_t piece_bytes = round_up(size_bytes, kPage);
    std::shared_ptr<Run> run = current.lock();
    if (run == nullptr || run->size_bytes - run->used_bytes < piece_bytes)
        current = run = std::make_shared<Run>(std::max(kRunBytes, round_up(piece_bytes, kLargePage)));
    std::byte* const piece = run->base + run->used_bytes;
    run->used_bytes += piece_bytes;
    return {std::move(run), piece};
}

}  // namespace tsqp
