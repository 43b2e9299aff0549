// `_native.FieldLinear`: checks its arguments while Python's lock is held, then works without it.
#pragma once

#include <pybind11/numpy.h>

#include <memory>

#include "border/held_slots.h"
#include "cpu/thread_pool.h"
#include "field/held_check.h"
#include "field/linear.h"
#include "field/quantise.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"

namespace tsqp {

inline const FieldKernels& active_field_kernels() { return field_kernels_of(active_kernels().name); }

// Weights that are read by products and written by nobody meanwhile: the calls work without Python's lock.
class HeldLinear {
  public:
    // While there is one, nobody changes the weights. Made and ended with Python's lock held.
    class Reading {
      public:
        explicit Reading(HeldLinear& linear) : linear_(linear) {
            if (linear.is_written_) throw py::value_error("the Linear's weights are being set");
            ++linear_.readers_;
        }
        ~Reading() { --linear_.readers_; }
        Reading(const Reading&) = delete;
        Reading& operator=(const Reading&) = delete;

      private:
        HeldLinear& linear_;
    };

    HeldLinear(Index outputs, Index inputs)
        : weights_(not_negative("outputs", outputs), not_negative("inputs", inputs)) {}

    void set_rows(Index first_output, const py::array& weight) {
        const std::size_t first = not_negative("first_output", first_output);
        const auto width = static_cast<Index>(weights_.inputs());
        const FieldKernels& kernels = active_field_kernels();
        const Writing writing(*this);
        if (weight.dtype().num() == py::dtype::num_of<std::uint16_t>())
            set(kernels, first, weight, data_of<const std::uint16_t>(weight, "weight", {-1, width}));
        else
            set(kernels, first, weight, data_of<const float>(weight, "weight", {-1, width}));
    }

    void set_bias(const py::array& bias) {
        const float* values = data_of<const float>(bias, "bias", {static_cast<Index>(weights_.outputs())});
        const Writing writing(*this);
        weights_.set_bias(values);
    }

    py::array_t<float> scales() {
        const Reading reading(*this);
        return py::array_t<float>(static_cast<Index>(weights_.outputs()), weights_.scales());
    }

    // None where there is none.
    py::object bias() {
        const Reading reading(*this);
        if (weights_.bias() == nullptr) return py::none();
        return py::array_t<float>(static_cast<Index>(weights_.outputs()), weights_.bias());
    }

    py::array_t<std::int8_t> quantised(Index first_output, Index rows) {
        const Reading reading(*this);
        const std::size_t first = not_negative("first_output", first_output),
                          count = not_negative("rows", rows);
        // Before anything is allocated for rows that there are not.
        if (first > weights_.outputs() || count > weights_.outputs() - first)
            weights_.unpack(first, count, nullptr);
        py::array_t<std::int8_t> bytes({rows, static_cast<Index>(weights_.inputs())});
        weights_.unpack(first, count, bytes.mutable_data());
        return bytes;
    }

    std::size_t num_bytes() const { return weights_.num_bytes(); }
    const FieldWeights& weights() const { return weights_; }

    std::unique_ptr<HeldCheck> check(const py::array& vectors, bool is_blinded) {
        const Reading reading(*this);
        return std::make_unique<HeldCheck>(weights_, vectors, is_blinded);
    }

    void apply(HeldSlots& slots, Index in_slot, Index out_slot, Index first_row, Index rows) {
        const Operands of = operands(slots, in_slot, out_slot, first_row, rows);
        if (of.in.dtype != Dtype::f32 || of.out.dtype != Dtype::f32)
            throw py::type_error("a Linear of w8 takes and gives f32");
        const FieldKernels& kernels = active_field_kernels();
        const Reading reading(*this);
        const HeldSlots::Running running(slots);
        const py::gil_scoped_release unlocked;
        // SAFETY: slots begin at a page, and rows of f32 keep to its alignment.
        apply_linear(kernels, weights_, reinterpret_cast<const float*>(of.in.data), of.in.rows,
                     reinterpret_cast<float*>(of.out.data));
    }

    void multiply(HeldSlots& slots, Index in_slot, Index out_slot, Index first_row, Index rows) {
        const Operands of = operands(slots, in_slot, out_slot, first_row, rows);
        if (of.in.dtype != Dtype::u32 || of.out.dtype != Dtype::u32)
            throw py::type_error("a product in the field takes and gives u32");
        const FieldKernels& kernels = active_field_kernels();
        const Reading reading(*this);
        const HeldSlots::Running running(slots);
        const py::gil_scoped_release unlocked;
        // SAFETY: slots begin at a page, and rows of u32 keep to its alignment.
        multiply_linear(kernels, weights_, reinterpret_cast<const std::uint32_t*>(of.in.data), of.in.rows,
                        reinterpret_cast<std::uint32_t*>(of.out.data));
    }

    py::tuple quantise(const py::array& x) {
        const auto width = static_cast<Index>(weights_.inputs());
        const float* values = data_of<const float>(x, "x", {-1, width});
        const auto rows = static_cast<std::size_t>(x.shape(0));
        py::array_t<std::int32_t> integers({x.shape(0), width});
        py::array_t<float> scales(x.shape(0));
        py::array_t<std::int32_t> digits(x.shape(0));
        std::int32_t* const to = integers.mutable_data();
        float* const scale = scales.mutable_data();
        std::int32_t* const of_row = digits.mutable_data();
        const FieldKernels& kernels = active_field_kernels();
        const std::uint64_t limit = squares_limit(weights_.squares());
        {
            const Reading reading(*this);
            const py::gil_scoped_release unlocked;
            const std::size_t inputs = weights_.inputs(), grain = 16384 / inputs + 1;
            parallel_rows(
                rows, grain, get_num_threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
                    for (std::size_t row = begin; row < end; ++row) {
                        const QuantisedRow found =
                            quantise_row(kernels, values + row * inputs, inputs, limit, to + row * inputs);
                        scale[row] = found.scale;
                        of_row[row] = static_cast<std::int32_t>(found.digits);
                    }
                });
        }
        return py::make_tuple(integers, scales, digits);
    }

  private:
    // As Reading, while somebody changes them.
    class Writing {
      public:
        explicit Writing(HeldLinear& linear) : linear_(linear) {
            if (linear.is_written_ || linear.readers_ > 0)
                throw py::value_error("the Linear's weights are in use");
            linear_.is_written_ = true;
        }
        ~Writing() { linear_.is_written_ = false; }
        Writing(const Writing&) = delete;
        Writing& operator=(const Writing&) = delete;

      private:
        HeldLinear& linear_;
    };

    struct Operands {
        Rows in, out;
    };
    Operands operands(const HeldSlots& slots, Index in_slot, Index out_slot, Index first_row,
                      Index rows) const {
        const std::size_t from = not_negative("in_slot", in_slot), to = not_negative("out_slot", out_slot);
        const std::size_t first = not_negative("first_row", first_row), count = not_negative("rows", rows);
        if (from == to) throw py::value_error("out_slot: expected another slot than in_slot");
        return {slots.rows(from, first, count, weights_.inputs()),
                slots.rows(to, first, count, weights_.outputs())};
    }

    template <class E>
    void set(const FieldKernels& kernels, std::size_t first, const py::array& weight, const E* values) {
        const auto rows = static_cast<std::size_t>(weight.shape(0));
        const py::gil_scoped_release unlocked;
        weights_.set_rows(kernels, first, rows, values);
    }

    FieldWeights weights_;
    std::size_t readers_ = 0;
    bool is_written_ = false;
};

}  // namespace tsqp
