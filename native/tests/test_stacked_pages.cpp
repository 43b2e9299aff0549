// Memory of many matrices: zeroed pieces one behind another, and back with the kernel when the last one goes.
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "cpu/stacked_pages.h"

using namespace tsqp;

namespace {

constexpr std::size_t kPage = 4096, kMegabyte = 1 << 20, kLargePage = 2 * kMegabyte;

std::uintptr_t address(const std::shared_ptr<std::byte>& piece) {
    return reinterpret_cast<std::uintptr_t>(piece.get());
}

bool is_mapped(std::uintptr_t page) {
    unsigned char in_core;
    return mincore(reinterpret_cast<void*>(page), kPage, &in_core) == 0 || errno != ENOMEM;
}

void test_pieces_follow_on_each_other_from_a_large_page_on() {
    const auto first = stacked_pages(kMegabyte), second = stacked_pages(1), third = stacked_pages(3 * kPage);
    CHECK(address(first) % kLargePage == 0);
    CHECK(address(second) == address(first) + kMegabyte);
    CHECK(address(third) == address(second) + kPage);
}

void test_a_piece_is_zeroed_and_its_own() {
    std::vector<std::shared_ptr<std::byte>> pieces;
    for (int i = 0; i < 20; ++i) {
        pieces.push_back(stacked_pages(5 * kMegabyte));
        for (std::size_t at = 0; at < 5 * kMegabyte; at += kPage)
            CHECK(pieces.back().get()[at] == std::byte{0});
        std::memset(pieces.back().get(), i + 1, 5 * kMegabyte);
    }
    for (int i = 0; i < 20; ++i)
        for (std::size_t at = 0; at < 5 * kMegabyte; at += kPage)
            CHECK(pieces[static_cast<std::size_t>(i)].get()[at] == static_cast<std::byte>(i + 1));
}

void test_a_piece_larger_than_a_run_has_one_of_its_own() {
    const auto large = stacked_pages(300 * kMegabyte + 1);
    large.get()[300 * kMegabyte] = std::byte{1};
    CHECK(address(large) % kLargePage == 0);
}

void test_memory_goes_with_the_last_piece_of_its_run() {
    auto first = stacked_pages(kMegabyte), second = stacked_pages(kMegabyte);
    const std::uintptr_t page = address(first);
    first.reset();
    CHECK(is_mapped(page));
    second.reset();
    CHECK(!is_mapped(page));
}

}  // namespace

int main() {
    test_pieces_follow_on_each_other_from_a_large_page_on();
    test_a_piece_is_zeroed_and_its_own();
    test_a_piece_larger_than_a_run_has_one_of_its_own();
    test_memory_goes_with_the_last_piece_of_its_run();
}
