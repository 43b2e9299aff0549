// Whose rows are whose: the rows of slots that the other side has, each for an operation that is in flight.
// Private memory: nothing that the other side writes decides it.
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

#include "border/layout.h"

namespace tsqp {

class Loans {
  public:
    // Hands rows over. They may be handed over again before they are taken back: the other side executes in
    // submission order.
    void lend(std::size_t slot, std::size_t first_row, std::size_t rows, std::string_view operation) {
        if (count_ == loans_.size()) throw std::length_error("more rows are lent than submissions can name");
        Loan& loan = at(count_++);
        loan.slot = slot;
        loan.first_row = first_row;
        loan.end_row = first_row + rows;
        loan.operation = operation;
    }

    // Ends the oldest loan: the other side has executed everything up to it.
    void take_back() {
        if (count_ == 0) throw std::logic_error("no rows are lent");
        oldest_ = (oldest_ + 1) % loans_.size();
        --count_;
    }

    // The oldest operation that some of a slot's rows [first_row, end_row) are lent to; nullptr: none.
    const std::string* holder(std::size_t slot, std::size_t first_row, std::size_t end_row) const {
        for (std::size_t i = 0; i < count_; ++i) {
            const Loan& loan = loans_[(oldest_ + i) % loans_.size()];
            if (loan.slot == slot && first_row < loan.end_row && loan.first_row < end_row)
                return &loan.operation;
        }
        return nullptr;
    }

    std::size_t count() const { return count_; }

  private:
    struct Loan {
        std::size_t slot = 0, first_row = 0, end_row = 0;
        std::string operation;
    };

    Loan& at(std::size_t place) { return loans_[(oldest_ + place) % loans_.size()]; }

    // A submission names two slots at most.
    std::array<Loan, 2 * kRingDepth> loans_;
    std::size_t oldest_ = 0, count_ = 0;
};

}  // namespace tsqp
