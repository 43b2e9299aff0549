#include "field/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/thread_pool.h"
#include "field/quantise.h"

namespace tsqp {
namespace {

constexpr std::size_t kDigitBytes = 640 * 1024;
// Where rows are few a task is a run of panels: two for each thread, so that one that wakes late finds work,
// and more of a large Linear, so that all end together.
constexpr std::size_t kTaskBytes = 1024 * 1024, kTasksPerThread = 2;

std::size_t ceil_div(std::size_t size, std::size_t block) { return (size + block - 1) / block; }

// A row's digits at `base` digit rows of a block, its further one behind those of all rows.
void write_digits(const FieldKernels& kernels, const std::int32_t* integers, std::size_t inputs,
                  std::size_t digits, std::size_t row, const DigitRows& digit_rows, std::uint8_t* to,
                  DigitBlock& block) {
    const std::size_t depth = digit_rows.depth(), base = digit_rows.base();
    const std::uint32_t offset = std::uint32_t{1} << (8 * digits - 1);
    for (std::size_t d = 0; d < digits; ++d) {
        std::size_t digit_row = row * base + d;
        if (d == base) {
            digit_row = block.digit_rows++;
            block.further[row] = static_cast<std::uint16_t>(digit_row);
        }
        std::uint8_t* const bytes = to + digit_row * depth;
        kernels.write_digit(integers, inputs, offset, static_cast<unsigned>(8 * d), bytes);
        std::memset(bytes + inputs, 0, depth - inputs);
    }
}

// What a calling thread keeps for its next Linear: pages that are new each time would cost more than the
// sums.
struct Scratch {
    DigitRows digit_rows;
    Pages<std::int32_t> integers;  // [threads, depth]
    Pages<std::uint32_t> sums;     // [threads, digit rows of a block, 64]
};
thread_local Scratch scratch;

template <class T>
T* reserve(Pages<T>& pages, std::size_t elements) {
    if (pages.size() < elements) pages = Pages<T>(elements, true);
    return pages.data();
}

}  // namespace

void apply_linear(const FieldKernels& kernels, const FieldWeights& weights, const float* x, std::size_t rows,
                  float* out) {
    constexpr std::size_t kBase = 2;
    const std::size_t inputs = weights.inputs(), depth = weights.depth(), num_threads = get_num_threads();
    const std::uint64_t limit = squares_limit(weights.squares());
    const std::size_t most_blocks = blocks_of_a_run(depth, kBase);
    DigitRows& digit_rows = scratch.digit_rows;
    digit_rows.reserve(std::min(most_blocks, ceil_div(rows, kBlockRows)), depth, kBase, true);
    std::int32_t* const all_integers = reserve(scratch.integers, num_threads * depth);
    for (std::size_t first = 0; first < rows; first += most_blocks * kBlockRows) {
        const std::size_t of_run = std::min(rows - first, most_blocks * kBlockRows),
                          num_blocks = ceil_div(of_run, kBlockRows);
        parallel_rows(
            num_blocks, 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
                std::int32_t* const integers = all_integers + worker * depth;
                for (std::size_t index = begin; index < end; ++index) {
                    const std::size_t from = index * kBlockRows;
                    DigitBlock& block = digit_rows.block(index);
                    block.rows = std::min(kBlockRows, of_run - from);
                    block.digit_rows = kBase * block.rows;
                    for (std::size_t row = 0; row < block.rows; ++row) {
                        const QuantisedRow quantised =
                            quantise_row(kernels, x + (first + from + row) * inputs, inputs, limit, integers);
                        block.scales[row] = quantised.scale;
                        block.further[row] = 0;
                        write_digits(kernels, integers, inputs, quantised.digits, row, digit_rows,
                                     digit_rows.digits(index), block);
                    }
                }
            });
        multiply_blocks(kernels, weights, digit_rows, num_blocks, out + first * weights.outputs());
    }
}

std::size_t blocks_of_a_run(std::size_t depth, std::size_t base) {
    return std::max<std::size_t>(1, kDigitBytes / (kBlockRows * base * depth));
}

void multiply_blocks(const FieldKernels& kernels, const FieldWeights& weights, const DigitRows& digit_rows,
                     std::size_t num_blocks, float* out) {
    const std::size_t panels = weights.num_panels(), outputs = weights.outputs(), base = digit_rows.base();
    const std::size_t num_threads = get_num_threads();
    const std::size_t sums_elements = kBlockRows * kMaxDigits * kPanelOutputs;
    std::uint32_t* const all_sums = reserve(scratch.sums, num_threads * sums_elements);
    const std::size_t units = panels * num_blocks;
    // A panel with a block of many rows is work enough.
    const std::size_t of_thread =
        std::max(kTasksPerThread, ceil_div(panels * weights.panel_bytes(), kTaskBytes * num_threads));
    const std::size_t tasks = num_blocks > 1 ? units : std::min(units, of_thread * num_threads);
    parallel_rows(tasks, 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        std::uint32_t* const sums = all_sums + worker * sums_elements;
        for (std::size_t unit = begin * units / tasks; unit < end * units / tasks; ++unit) {
            // A panel stays in the caches while all blocks go over it.
            const std::size_t panel = unit / num_blocks, index = unit % num_blocks;
            const DigitBlock& block = digit_rows.block(index);
            kernels.multiply({.digits = digit_rows.digits(index),
                              .stride = digit_rows.depth(),
                              .rows = block.digit_rows,
                              .panel = weights.panel(panel),
                              .depth = weights.depth(),
                              .sums = sums});
            const std::size_t output = panel * kPanelOutputs;
            ResultArgs args{.digits = {},
                            .num_digits = base,
                            .offset = 0,
                            .column_sums = weights.column_sums() + output,
                            .scales = weights.scales() + output,
                            .bias = weights.bias() == nullptr ? nullptr : weights.bias() + output,
                            .scale = 0.0f,
                            .out = out + index * kBlockRows * outputs + output,
                            .columns = std::min(kPanelOutputs, outputs - output)};
            for (std::size_t row = 0; row < block.rows; ++row) {
                for (std::size_t d = 0; d < base; ++d)
                    args.digits[d] = sums + (row * base + d) * kPanelOutputs;
                args.num_digits = base;
                if (block.further[row] != 0)
                    args.digits[args.num_digits++] = sums + block.further[row] * kPanelOutputs;
                args.offset = std::uint32_t{1} << (8 * args.num_digits - 1);
                args.scale = block.scales[row];
                kernels.result(args);
                args.out += outputs;
            }
        }
    });
}

}  // namespace tsqp
