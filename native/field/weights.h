// A Linear's weights as bytes, packed in panels (field.h), with what its results need beside them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "field/field.h"

namespace tsqp {

class FieldWeights {
  public:
    // All zeros, with scales of 1. Raises invalid_argument unless 0 < outputs and 0 < inputs <=
    // kMaxFieldInputs.
    FieldWeights(std::size_t outputs, std::size_t inputs);
    FieldWeights(FieldWeights&&) = default;

    // weight [rows, inputs] f32 or bf16 (as its bits), row-major, quantised row by row into the outputs
    // [first, first + rows) on the threads of the pool. Raises out_of_range for outputs that there are not,
    // invalid_argument where a row holds a NaN or an infinity; what the outputs named then hold is
    // unspecified.
    void set_rows(const FieldKernels& kernels, std::size_t first, std::size_t rows, const float* weight);
    void set_rows(const FieldKernels& kernels, std::size_t first, std::size_t rows,
                  const std::uint16_t* weight);
    // bias [outputs].
    void set_bias(const float* bias);
    // The bytes of outputs [first, first + rows) to [rows, inputs]. Raises out_of_range.
    void unpack(std::size_t first, std::size_t rows, std::int8_t* to) const;

    std::size_t outputs() const { return outputs_; }
    std::size_t inputs() const { return inputs_; }
    std::size_t depth() const { return depth_; }
    std::size_t num_panels() const { return (outputs_ + kPanelOutputs - 1) / kPanelOutputs; }
    std::size_t panel_bytes() const { return depth_ * kPanelOutputs; }
    const std::int8_t* panel(std::size_t panel) const { return panels_ + panel * panel_bytes(); }
    // Of whole panels: [num_panels() * 64].
    const float* scales() const { return scales_.data(); }
    const std::int32_t* column_sums() const { return column_sums_.data(); }
    const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
    // The largest sum Wq^2 of an output.
    std::uint32_t squares() const { return largest_squares_; }
    std::size_t num_bytes() const;
    // Of scales and column sums: tells Linears of a model apart, though not from one made to be mistaken.
    std::uint64_t fingerprint() const;

  private:
    template <class E>
    void set(std::size_t first, std::size_t rows, const E* weight,
             WeightRow (*quantise)(const E*, std::size_t, std::int8_t*) noexcept);
    void require_outputs(std::size_t first, std::size_t rows) const;
    // Where the first four inputs of an output lie; the next ones follow every 4 * kPanelOutputs bytes.
    std::size_t fours_of(std::size_t output) const {
        return output / kPanelOutputs * panel_bytes() + output % kPanelOutputs * 4;
    }

    std::size_t outputs_, inputs_, depth_;
    std::shared_ptr<std::byte> memory_;
    std::int8_t* panels_;  // in `memory_`
    std::vector<float> scales_, bias_;
    std::vector<std::int32_t> column_sums_;
    std::vector<std::uint32_t> squares_;
    std::uint32_t largest_squares_ = 0;
};

}  // namespace tsqp
