// Rows of activations as digit rows, in blocks of a few rows, which one call of a product takes.
//
// The digits of a block are one matrix of bytes [digit rows, depth], so that tiles can read it: first each
// row's first `base` digits, row by row, then the third digits of those rows that have one more.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/pages.h"
#include "field/field.h"

namespace tsqp {

// 96 digit rows of two digits: whole runs of the dot product's 6 rows and of the tiles' 32.
inline constexpr std::size_t kBlockRows = 48;

struct DigitBlock {
    std::size_t rows, digit_rows;
    float scales[kBlockRows];
    std::uint16_t further[kBlockRows];  // the digit row of a row's further digit; 0: it has none
};

// The memory of `num_blocks` blocks; kept and grown by who uses it again.
class DigitRows {
  public:
    // Every row has `base` digits, and one more where `has_further` allows it.
    void reserve(std::size_t num_blocks, std::size_t depth, std::size_t base, bool has_further) {
        depth_ = depth, base_ = base;
        block_bytes_ = kBlockRows * (base + (has_further ? 1 : 0)) * depth;
        if (digits_.size() < num_blocks * block_bytes_)
            digits_ = Pages<std::uint8_t>(num_blocks * block_bytes_, true);
        if (blocks_.size() < num_blocks) blocks_ = Pages<DigitBlock>(num_blocks, false);
    }

    std::size_t depth() const { return depth_; }
    std::size_t base() const { return base_; }
    DigitBlock& block(std::size_t block) const { return blocks_.data()[block]; }
    std::uint8_t* digits(std::size_t block) const { return digits_.data() + block * block_bytes_; }

  private:
    std::size_t depth_ = 0, base_ = 0, block_bytes_ = 0;
    Pages<std::uint8_t> digits_;
    Pages<DigitBlock> blocks_;
};

}  // namespace tsqp
