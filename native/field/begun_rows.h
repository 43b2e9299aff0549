// What a check keeps of rows between their begin and their finish. Private memory, under Python's lock.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pads/rows.h"

namespace tsqp {

class BegunRows {
    enum class State : std::uint8_t { none, taken, begun };
    // What blinds a row: one of those that were taken; or nothing.
    struct Pad {
        std::shared_ptr<PadRows> rows;
        std::size_t index;
    };

  public:
    explicit BegunRows(std::size_t num_vectors) : num_vectors_(num_vectors) {}

    // Rows that a call works on, which no other may take meanwhile. Where it ends without `done`, they are as
    // they were.
    class Claim {
      public:
        ~Claim() {
            for (std::size_t row = first_; row < first_ + count_; ++row) rows_.states_[row] = after_;
        }
        Claim(const Claim&) = delete;
        Claim& operator=(const Claim&) = delete;

        std::vector<float> scales;        // [rows]
        std::vector<std::uint32_t> sums;  // [rows, num_vectors]

      protected:
        Claim(BegunRows& rows, std::size_t first, std::size_t count, State before)
            : scales(count),
              sums(count * rows.num_vectors_),
              rows_(rows),
              first_(first),
              count_(count),
              after_(before) {
            if (count > 0 && rows.states_.size() < first + count) rows.grow(first + count);
            for (std::size_t row = first; row < first + count; ++row)
                if (rows.states_[row] != before)
                    throw std::invalid_argument("row " + std::to_string(row) + " of the check " +
                                                describe(rows.states_[row]));
            std::fill_n(rows.states_.begin() + static_cast<std::ptrdiff_t>(first), count, State::taken);
        }

        BegunRows& rows_;
        std::size_t first_, count_;
        State after_;

      private:
        static const char* describe(State state) {
            return state == State::none    ? "was not begun"
                   : state == State::begun ? "was begun and is not finished"
                                           : "is in use";
        }
    };

    class Beginning : public Claim {
      public:
        Beginning(BegunRows& rows, std::size_t first, std::size_t count)
            : Claim(rows, first, count, State::none) {}
        // pads: of these rows, or null.
        void done(const std::shared_ptr<PadRows>& pads) {
            rows_.keep(first_, *this);
            if (pads) {
                if (rows_.pads_.size() < first_ + count_) rows_.pads_.resize(first_ + count_);
                for (std::size_t row = 0; row < count_; ++row) rows_.pads_[first_ + row] = {pads, row};
            }
            after_ = State::begun;
        }
    };

    class Finishing : public Claim {
      public:
        Finishing(BegunRows& rows, std::size_t first, std::size_t count)
            : Claim(rows, first, count, State::begun) {
            rows_.copy(first_, *this);
            for (std::size_t row = first; row < std::min(first + count, rows.pads_.size()); ++row)
                if (const Pad& pad = rows.pads_[row]; pad.rows) {
                    pad.rows->stock().require_this_process();
                    products_.resize(count);
                    products_[row - first] = pad.rows->product(pad.index);
                }
        }
        // rW of each row that is blinded; null where none is.
        const std::uint32_t* const* products() const {
            return products_.empty() ? nullptr : products_.data();
        }
        // The rows' pads are used, and no longer held here.
        void done() {
            for (std::size_t row = 0; row < products_.size(); ++row)
                if (products_[row] != nullptr) {
                    const Pad pad = std::exchange(rows_.pads_[first_ + row], {});
                    pad.rows->count_used();
                }
            after_ = State::none;
        }

      private:
        std::vector<const std::uint32_t*> products_;
    };

    std::size_t num_bytes() const {
        return pads_.size() * sizeof(Pad) +
               states_.size() * (sizeof(State) + sizeof(float) + num_vectors_ * sizeof(std::uint32_t));
    }

  private:
    void grow(std::size_t rows) {
        scales_.resize(rows);
        sums_.resize(rows * num_vectors_);
        states_.resize(rows, State::none);
    }
    auto scales_of(std::size_t row) { return scales_.begin() + static_cast<std::ptrdiff_t>(row); }
    auto sums_of(std::size_t row) { return sums_.begin() + static_cast<std::ptrdiff_t>(row * num_vectors_); }
    void keep(std::size_t first, const Claim& claim) {
        std::copy(claim.scales.begin(), claim.scales.end(), scales_of(first));
        std::copy(claim.sums.begin(), claim.sums.end(), sums_of(first));
    }
    void copy(std::size_t first, Claim& claim) {
        std::copy_n(scales_of(first), claim.scales.size(), claim.scales.begin());
        std::copy_n(sums_of(first), claim.sums.size(), claim.sums.begin());
    }

    std::size_t num_vectors_;
    std::vector<State> states_;
    std::vector<float> scales_;
    std::vector<std::uint32_t> sums_;  // [rows, num_vectors]
    std::vector<Pad> pads_;            // as far as there have been any
};

}  // namespace tsqp
