// Pads that were taken from a stock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "pads/stock.h"

namespace tsqp {

// Rows that were taken. They are used where FieldCheck::finish has made results with them, and burned
// otherwise; when nobody holds them any more, they are wiped, and their slots free.
class PadRows {
  public:
    PadRows(std::shared_ptr<PadStock> stock, std::size_t linear, std::uint64_t first_row, std::size_t rows)
        : stock_(std::move(stock)), linear_(linear), first_row_(first_row), rows_(rows) {}
    ~PadRows() { stock_->give_back(linear_, first_row_, rows_, rows_ - used_); }
    PadRows(const PadRows&) = delete;
    PadRows& operator=(const PadRows&) = delete;

    const PadStock& stock() const { return *stock_; }
    std::size_t linear() const { return linear_; }
    std::uint64_t first_row() const { return first_row_; }
    std::size_t rows() const { return rows_; }
    // rW [outputs] of one of them.
    const std::uint32_t* product(std::size_t row) const { return stock_->row(linear_, first_row_ + row); }

    // Before anything that they blind leaves. Throws invalid_argument where they have blinded something: a
    // second row under one pad shows the difference of both.
    void spend();
    // A result was made with one of them.
    void count_used() {
        ++used_;
        stock_->num_used_.fetch_add(1, std::memory_order_relaxed);
    }

  private:
    const std::shared_ptr<PadStock> stock_;
    const std::size_t linear_;
    const std::uint64_t first_row_;
    const std::size_t rows_;
    std::size_t used_ = 0;
    bool is_spent_ = false;
};

}  // namespace tsqp
