#include "field/weights.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/pages.h"
#include "cpu/stacked_pages.h"
#include "cpu/thread_pool.h"

namespace tsqp {
namespace {

std::size_t require_sizes(std::size_t outputs, std::size_t inputs) {
    constexpr std::size_t kMaxOutputs = std::size_t{1} << 31;  // far from where bytes would wrap
    if (outputs == 0 || outputs > kMaxOutputs)
        throw std::invalid_argument("outputs: got " + std::to_string(outputs) + ", expected 1 to " +
                                    std::to_string(kMaxOutputs));
    if (inputs == 0 || inputs > kMaxFieldInputs)
        throw std::invalid_argument("inputs: got " + std::to_string(inputs) + ", expected 1 to " +
                                    std::to_string(kMaxFieldInputs) + ", beyond which sums of digits wrap");
    return padded_inputs(inputs);
}

}  // namespace

FieldWeights::FieldWeights(std::size_t outputs, std::size_t inputs)
    : outputs_(outputs),
      inputs_(inputs),
      depth_(require_sizes(outputs, inputs)),
      memory_(stacked_pages(num_panels() * panel_bytes())),
      panels_(reinterpret_cast<std::int8_t*>(memory_.get())),
      scales_(num_panels() * kPanelOutputs, 1.0f),
      column_sums_(scales_.size(), 0),
      squares_(scales_.size(), 0) {}

void FieldWeights::set_rows(const FieldKernels& kernels, std::size_t first, std::size_t rows,
                            const float* weight) {
    set(first, rows, weight, kernels.quantise_f32_weights);
}

void FieldWeights::set_rows(const FieldKernels& kernels, std::size_t first, std::size_t rows,
                            const std::uint16_t* weight) {
    set(first, rows, weight, kernels.quantise_bf16_weights);
}

template <class E>
void FieldWeights::set(std::size_t first, std::size_t rows, const E* weight,
                       WeightRow (*quantise)(const E*, std::size_t, std::int8_t*) noexcept) {
    require_outputs(first, rows);
    if (rows == 0) return;
    const std::size_t first_panel = first / kPanelOutputs, end_panel = (first + rows - 1) / kPanelOutputs + 1;
    const std::size_t num_threads = get_num_threads();
    // A panel's rows side by side, as they are packed from there.
    const std::size_t block_bytes = panel_bytes();
    const Pages<std::int8_t> blocks(num_threads * block_bytes, true);
    constexpr std::size_t kNone = SIZE_MAX;
    std::atomic<std::size_t> not_finite{kNone};
    parallel_rows(
        end_panel - first_panel, 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
            std::int8_t* const block = blocks.data() + worker * block_bytes;
            for (std::size_t panel = first_panel + begin; panel < first_panel + end; ++panel) {
                const std::size_t from = std::max(first, panel * kPanelOutputs),
                                  to = std::min(first + rows, (panel + 1) * kPanelOutputs);
                for (std::size_t output = from; output < to; ++output) {
                    std::int8_t* const bytes = block + (output - from) * depth_;
                    const WeightRow row = quantise(weight + (output - first) * inputs_, inputs_, bytes);
                    std::memset(bytes + inputs_, 0, depth_ - inputs_);
                    if (!row.is_finite) not_finite.store(output, std::memory_order_relaxed);
                    scales_[output] = row.scale;
                    column_sums_[output] = row.sum;
                    squares_[output] = row.squares;
                }
                for (std::size_t k = 0; k < depth_; k += 4) {
                    std::int8_t* const fours = panels_ + fours_of(from) + k * kPanelOutputs;
                    for (std::size_t row = 0; row < to - from; ++row)
                        std::memcpy(fours + row * 4, block + row * depth_ + k, 4);
                }
            }
        });
    largest_squares_ = *std::max_element(squares_.begin(), squares_.end());
    if (not_finite != kNone)
        throw std::invalid_argument("weight: row " + std::to_string(not_finite) +
                                    " of the Linear holds a NaN or an infinity");
}

void FieldWeights::set_bias(const float* bias) {
    bias_.assign(scales_.size(), 0.0f);
    std::copy_n(bias, outputs_, bias_.begin());
}

void FieldWeights::unpack(std::size_t first, std::size_t rows, std::int8_t* to) const {
    require_outputs(first, rows);
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t k = 0; k < inputs_; k += 4)
            std::memcpy(to + row * inputs_ + k, panels_ + fours_of(first + row) + k * kPanelOutputs,
                        std::min<std::size_t>(4, inputs_ - k));
}

std::size_t FieldWeights::num_bytes() const {
    const std::size_t an_output =
        sizeof(float) * (bias_.empty() ? 1 : 2) + sizeof(std::int32_t) + sizeof(std::uint32_t);
    return num_panels() * panel_bytes() + scales_.size() * an_output;
}

std::uint64_t FieldWeights::fingerprint() const {
    std::uint64_t hash = inputs_;
    const auto add = [&hash](std::uint32_t word) {
        hash = (hash ^ word) * 0x9E3779B97F4A7C15;
        hash ^= hash >> 32;
    };
    for (std::size_t output = 0; output < outputs_; ++output) {
        add(std::bit_cast<std::uint32_t>(scales_[output]));
        add(static_cast<std::uint32_t>(column_sums_[output]));
    }
    return hash;
}

void FieldWeights::require_outputs(std::size_t first, std::size_t rows) const {
    if (first > outputs_ || rows > outputs_ - first)
        throw std::out_of_range("outputs [" + std::to_string(first) + ", +" + std::to_string(rows) +
                                ") of a Linear that has " + std::to_string(outputs_));
}

}  // namespace tsqp
