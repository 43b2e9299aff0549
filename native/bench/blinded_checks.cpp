// What `scripts/bench_pads.py` measures of blinded rows beside draws and masks: the check that takes pads off
// beside the one without, and the maker that multiplies beside the products that it is made of.
//
// An extension of its own: the TEE process loads no benchmark.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu/pages.h"
#include "field/check.h"
#include "field/linear.h"
#include "field/runs.h"
#include "kernels/dispatch.h"
#include "pads/direct_maker.h"

namespace py = pybind11;

namespace tsqp {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

const FieldKernels& field_kernels() { return field_kernels_of(active_kernels().name); }
const CheckKernels& check_kernels() { return check_kernels_of(active_kernels().name); }

void fill(std::uint32_t* words, std::size_t size, std::uint32_t below) {
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < size; ++i) {
        state = state * 1664525 + 1013904223;
        words[i] = state % below;
    }
}

FieldWeights weights_of(std::size_t outputs, std::size_t inputs) {
    std::vector<float> weight(outputs * inputs);
    std::uint32_t state = 1;
    for (float& each : weight) {
        state = state * 1664525 + 1013904223;
        each = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-31f;
    }
    FieldWeights weights(outputs, inputs);
    weights.set_rows(field_kernels(), 0, outputs, weight.data());
    return weights;
}

// Rows of y that are checked by two vectors, with the pads of a stock of so many rows, one after the other: of
// few they stay in the caches.
class BlindedChecks {
  public:
    BlindedChecks(std::size_t outputs, std::size_t inputs, std::size_t rows, std::size_t stock_rows)
        : rows_(rows),
          stock_rows_(stock_rows),
          vectors_(2 * outputs),
          y_(rows * outputs, true),
          stock_(stock_rows * outputs, true),
          out_(rows * outputs, true),
          scales_(rows, 3.0f),
          sums_(2 * rows),
          pads_(rows) {
        const FieldWeights weights = weights_of(outputs, inputs);
        fill(vectors_.data(), vectors_.size(), kPrime);
        fill(y_.data(), y_.size(), kPrime);
        fill(stock_.data(), stock_.size(), kPrime);
        check_ = std::make_unique<FieldCheck>(check_kernels(), weights, vectors_.data(), 2);
    }

    // Seconds of `times` calls, with pads or without.
    double finish(std::size_t times, bool with_pads) {
        const py::gil_scoped_release unlocked;
        const auto begin = Clock::now();
        for (std::size_t i = 0; i < times; ++i) {
            for (const std::uint32_t*& pad : pads_) {
                pad = stock_.data() + next_ * check_->outputs();
                next_ = next_ + 1 == stock_rows_ ? 0 : next_ + 1;
            }
            check_->finish(check_kernels(), y_.data(), rows_, scales_.data(), sums_.data(), out_.data(),
                           nullptr, with_pads ? pads_.data() : nullptr);
        }
        return seconds_since(begin);
    }

  private:
    std::size_t rows_, stock_rows_, next_ = 0;
    std::vector<std::uint32_t> vectors_;
    Pages<std::uint32_t> y_, stock_;
    Pages<float> out_;
    std::vector<float> scales_;
    std::vector<std::uint32_t> sums_;
    std::vector<const std::uint32_t*> pads_;
    std::unique_ptr<FieldCheck> check_;
};

// Several Linears of one shape, one after the other, on the calling thread alone.
class DirectPads {
  public:
    DirectPads(std::size_t outputs, std::size_t inputs, std::size_t copies) {
        std::vector<const FieldWeights*> weights;
        linears_.reserve(copies);
        for (std::size_t i = 0; i < copies; ++i) {
            linears_.push_back(weights_of(outputs, inputs));
            weights.push_back(&linears_.back());
        }
        const std::uint8_t seed[32] = {1};
        maker_ = std::make_unique<DirectMaker>(
            std::make_shared<PadKeys>("session", "digest", 0, copies, seed), std::move(weights));
        rows_ = maker_->batch_rows();
        made_ = Pages<std::uint32_t>(rows_ * outputs, true);
        run_rows_ = std::max(rows_, blocks_of_a_run(linears_[0].depth(), kMaxDigits) * kBlockRows);
        out_ = Pages<float>(run_rows_ * outputs, true);
        const std::size_t blocks = blocks_of_rows(run_rows_);
        digit_rows_.reserve(blocks, linears_[0].depth(), kMaxDigits, kMaxDigits);
        for (std::size_t i = 0; i < blocks; ++i) {
            for (IntegerRow& row : digit_rows_.begin_block(i, kBlockRows).row)
                row = {.digits = kMaxDigits, .scale = 1.0f, .is_narrow = false};
            std::uint8_t* const bytes = digit_rows_.digits(i);
            for (std::size_t at = 0; at < kBlockRows * kMaxDigits * digit_rows_.depth(); ++at)
                bytes[at] = static_cast<std::uint8_t>(at * 37);
        }
    }

    // Of a batch, and of a run of products at most.
    std::size_t made_rows() const { return rows_; }
    std::size_t product_rows() const { return run_rows_; }

    // Seconds that a batch of one Linear takes: drawn, multiplied, put together.
    double make(std::size_t linear) {
        const py::gil_scoped_release unlocked;
        const auto begin = Clock::now();
        maker_->make(linear, next_row_, rows_, made_.data(), Rest());
        next_row_ += rows_;
        return seconds_since(begin);
    }
    // Seconds that blocks of so many rows take whose digits are there.
    double multiply(std::size_t linear, std::size_t rows) {
        const py::gil_scoped_release unlocked;
        const auto begin = Clock::now();
        multiply_blocks(field_kernels(), linears_[linear], digit_rows_,
                        blocks_of_rows(std::min(rows, run_rows_)), out_.data());
        return seconds_since(begin);
    }

  private:
    std::vector<FieldWeights> linears_;
    std::unique_ptr<DirectMaker> maker_;
    std::size_t rows_, run_rows_;
    std::uint64_t next_row_ = 0;
    Pages<std::uint32_t> made_;
    Pages<float> out_;
    DigitRows digit_rows_;
};

}  // namespace
}  // namespace tsqp

PYBIND11_MODULE(_blinded_checks, module) {
    using namespace tsqp;
    using namespace py::literals;
    module.doc() =
        "Checks that take pads off and the maker of their products, timed: native/bench/blinded_checks.cpp.";
    module.def("field_instruction_set", [] { return field_kernels().name; });
    py::class_<BlindedChecks>(module, "BlindedChecks")
        .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t>(), "outputs"_a, "inputs"_a,
             "rows"_a, "stock_rows"_a)
        .def("finish", &BlindedChecks::finish, "times"_a, "with_pads"_a);
    py::class_<DirectPads>(module, "DirectPads")
        .def(py::init<std::size_t, std::size_t, std::size_t>(), "outputs"_a, "inputs"_a, "copies"_a)
        .def_property_readonly("made_rows", &DirectPads::made_rows)
        .def_property_readonly("product_rows", &DirectPads::product_rows)
        .def("make", &DirectPads::make, "linear"_a)
        .def("multiply", &DirectPads::multiply, "linear"_a, "rows"_a);
}
