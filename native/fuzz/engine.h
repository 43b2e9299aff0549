// What a fuzz target needs: libFuzzer's entry, a check that is a finding, and an input read piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "check.h"

extern "C" int LLVMFuzzerRunDriver(int* argc, char*** argv, int (*target)(const std::uint8_t*, std::size_t));

namespace tsqp {

// Numbers out of the input; zeros when it is at its end.
class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : left_(data, size) {}

    bool empty() const { return left_.empty(); }

    template <class T>
    T take() {
        T value{};
        const std::size_t bytes = left_.size() < sizeof(T) ? left_.size() : sizeof(T);
        std::memcpy(&value, left_.data(), bytes);
        left_ = left_.subspan(bytes);
        return value;
    }

    // Small numbers take one byte, so that most are near the bounds; the highest byte announces any 64 bits.
    std::uint64_t take_number() {
        const auto byte = take<std::uint8_t>();
        return byte == UINT8_MAX ? take<std::uint64_t>() : byte;
    }

  private:
    std::span<const std::uint8_t> left_;
};

}  // namespace tsqp
