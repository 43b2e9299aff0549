// Rows of integers as digit rows, in blocks of a few rows, which one call of a product takes.
//
// The digits of a block are one matrix of bytes [digit rows, depth], so that tiles can read it: first each
// row's first `base` digits, row by row, then what digits more single rows of it have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/pages.h"
#include "field/field.h"

namespace tsqp {

// 96 digit rows of two digits: whole runs of the dot product's 6 rows and of the tiles' 32.
inline constexpr std::size_t kBlockRows = 48;

// What is known of a row of integers c: how many digits hold it, what its result is divided by, and whether
// |sum_k c[k] W[j, k]| < p for every output.
struct IntegerRow {
    std::size_t digits;
    float scale;
    bool is_narrow;
};

struct DigitBlock {
    std::size_t rows, digit_rows;
    bool has_pairs_alone;  // each row has two digits and is narrow
    IntegerRow row[kBlockRows];
    std::uint16_t further[kBlockRows];  // the first digit row of a row's digits beyond the base
};

// The memory of `num_blocks` blocks; kept and grown by who uses it again.
class DigitRows {
  public:
    // Every row has `base` digits at least, and `most` at most.
    void reserve(std::size_t num_blocks, std::size_t depth, std::size_t base, std::size_t most) {
        depth_ = depth, base_ = base;
        block_bytes_ = kBlockRows * most * depth;
        if (digits_.size() < num_blocks * block_bytes_)
            digits_ = Pages<std::uint8_t>(num_blocks * block_bytes_, true).withheld();
        if (blocks_.size() < num_blocks) blocks_ = Pages<DigitBlock>(num_blocks, false);
    }

    // A block of so many rows, to be added one by one.
    DigitBlock& begin_block(std::size_t index, std::size_t rows) const {
        DigitBlock& block = this->block(index);
        block.rows = rows;
        block.digit_rows = base_ * rows;
        block.has_pairs_alone = base_ == 2;
        return block;
    }

    // Row `row` of a block: its integers [inputs], which its digits hold.
    void add_row(const FieldKernels& kernels, std::size_t index, std::size_t row, const IntegerRow& of_row,
                 const std::int32_t* integers, std::size_t inputs) const;

    std::size_t depth() const { return depth_; }
    std::size_t base() const { return base_; }
    DigitBlock& block(std::size_t index) const { return blocks_.data()[index]; }
    std::uint8_t* digits(std::size_t index) const { return digits_.data() + index * block_bytes_; }

  private:
    std::size_t depth_ = 0, base_ = 0, block_bytes_ = 0;
    Pages<std::uint8_t> digits_;
    Pages<DigitBlock> blocks_;
};

}  // namespace tsqp
