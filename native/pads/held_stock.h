// `_native.PadStock`: checks its arguments while Python's lock is held, and waits without it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "field/held_linear.h"
#include "pads/direct_maker.h"
#include "pads/rows.h"
#include "pads/stock.h"

namespace tsqp {

class HeldStock {
  public:
    using Linears = std::vector<std::shared_ptr<HeldLinear>>;

    HeldStock(std::shared_ptr<PadKeys> keys, const Linears& linears, Index capacity_rows, Index num_threads,
              bool lock)
        : linears_(linears) {
        std::vector<const FieldWeights*> weights;
        std::vector<StockedLinear> stocked;
        for (const auto& linear : linears_) {
            // SAFETY: until the threads have ended nobody changes the weights, and `linears_` keeps them.
            readings_.emplace_back(*linear);
            weights.push_back(&linear->weights());
            stocked.push_back({linear->weights().outputs(), linear->weights().fingerprint()});
        }
        const std::size_t capacity = not_negative("capacity_rows", capacity_rows),
                          threads = not_negative("num_threads", num_threads);
        auto maker = std::make_unique<DirectMaker>(keys, std::move(weights));
        const py::gil_scoped_release unlocked;
        stock_ = std::make_shared<PadStock>(std::move(keys), std::move(maker), std::move(stocked), capacity,
                                            threads, lock);
    }
    ~HeldStock() { close(); }
    HeldStock(const HeldStock&) = delete;
    HeldStock& operator=(const HeldStock&) = delete;

    static std::size_t row_bytes(const Linears& linears) {
        std::size_t words = 0;
        for (const auto& linear : linears) words += linear->weights().outputs();
        return words * sizeof(std::uint32_t);
    }

    std::shared_ptr<PadRows> take(Index linear, Index rows) {
        return stock_->take(not_negative("linear", linear), not_negative("rows", rows));
    }

    // In pieces, between which signals reach Python.
    bool wait(Index linear, Index rows, double timeout_s) {
        const std::size_t of = not_negative("linear", linear), count = not_negative("rows", rows);
        if (!(timeout_s >= 0)) throw py::value_error("timeout_s: expected 0 or more");
        constexpr double kMostSeconds = 1e9;  // far from where nanoseconds would wrap
        const std::chrono::duration<double> timeout(std::min(timeout_s, kMostSeconds));
        const auto end =
            std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(timeout);
        for (;;) {
            const auto left = end - std::chrono::steady_clock::now();
            bool is_there;
            {
                const py::gil_scoped_release unlocked;
                is_there = stock_->wait(of, count, std::min<std::chrono::nanoseconds>(left, kPiece));
            }
            if (is_there || left <= kPiece || stock_->is_ending() || count > stock_->capacity())
                return is_there;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
    }

    void rest(bool is_asked) { stock_->rest(is_asked); }

    std::size_t available_of(Index linear) const {
        return stock_->available_of(not_negative("linear", linear));
    }
    const PadStock& stock() const { return *stock_; }

    void close() {
        // Whoever closes it meanwhile too: the weights are read until the threads have ended.
        if (std::exchange(is_closing_, true)) return;
        {
            const py::gil_scoped_release unlocked;
            stock_->close();
        }
        readings_.clear();
    }

  private:
    static constexpr std::chrono::milliseconds kPiece{100};

    const Linears linears_;
    std::deque<HeldLinear::Reading> readings_;
    std::shared_ptr<PadStock> stock_;
    bool is_closing_ = false;
};

}  // namespace tsqp
