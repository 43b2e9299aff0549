// Rows through a Linear on the threads of the pool: integers, digits, products, and what is made of the sums.
// Who calls says how a row becomes integers and what becomes of its sums.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/thread_pool.h"
#include "field/digit_rows.h"
#include "field/weights.h"

namespace tsqp {

// One row's sums with one panel.
//
//   Shapes: digits[d] [64]: the sums of digit d of the row.
struct RowSums {
    const std::uint32_t* digits[kMaxDigits];
    const IntegerRow& of_row;
    std::size_t row;              // of those of the run
    std::size_t output, columns;  // the outputs that the panel has
};

// What a calling thread keeps for its next Linear: pages that are new each time would cost more than the
// sums.
struct RunScratch {
    DigitRows digit_rows;
    Pages<std::int32_t> integers;  // [threads, depth]
    Pages<std::uint32_t> sums;     // [threads, digit rows of a block, 64]
    static RunScratch& of_this_thread();
};

template <class T>
T* reserved(Pages<T>& pages, std::size_t elements) {
    if (pages.size() < elements) pages = Pages<T>(elements, true).withheld();
    return pages.data();
}

constexpr std::size_t blocks_of_rows(std::size_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Rows are taken in runs of so many blocks, whose digits stay in the second-level cache while the panels go
// over them.
std::size_t blocks_of_a_run(std::size_t depth, std::size_t base);

// Puts a row's field elements where they belong in the rows [rows of the run, outputs) of a run.
void put_residues(const FieldKernels& kernels, const FieldWeights& weights, const RowSums& sums,
                  std::uint32_t* run);

// In how many tasks the panels go over the blocks.
std::size_t tasks_of_a_run(const FieldWeights& weights, std::size_t num_blocks, std::size_t num_threads);

// One block's rows of two digits with a whole panel, for who takes their field elements where they belong.
struct PairRun {
    std::size_t row;     // of those of the run, the block's first
    std::size_t output;  // the panel's first
    PairsArgs args;      // but for where they go
};

// The products of blocks whose digits are there.
//
//   result: (const RowSums&), once for each row and panel. Where it can be called with a PairRun too, it is,
//           for blocks of pairs alone where the kernels have products of pairs.
template <class Result>
void multiply_run(const FieldKernels& kernels, const FieldWeights& weights, const DigitRows& digit_rows,
                  std::size_t num_blocks, std::size_t num_threads, const Result& result) {
    const std::size_t outputs = weights.outputs(), base = digit_rows.base();
    const std::size_t sums_elements = kBlockRows * kMaxDigits * kPanelOutputs;
    std::uint32_t* const all_sums = reserved(RunScratch::of_this_thread().sums, num_threads * sums_elements);
    const std::size_t units = weights.num_panels() * num_blocks;
    const std::size_t tasks = tasks_of_a_run(weights, num_blocks, num_threads);
    parallel_rows(tasks, 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        std::uint32_t* const sums = all_sums + worker * sums_elements;
        for (std::size_t unit = begin * units / tasks; unit < end * units / tasks; ++unit) {
            // A panel stays in the caches while all blocks go over it.
            const std::size_t panel = unit / num_blocks, index = unit % num_blocks;
            const DigitBlock& block = digit_rows.block(index);
            if constexpr (std::is_invocable_v<Result, const PairRun&>)
                if (kernels.multiply_pairs != nullptr && block.has_pairs_alone &&
                    outputs - panel * kPanelOutputs >= kPanelOutputs) {
                    result(PairRun{.row = index * kBlockRows,
                                   .output = panel * kPanelOutputs,
                                   .args = {.digits = digit_rows.digits(index),
                                            .stride = digit_rows.depth(),
                                            .rows = block.rows,
                                            .panel = weights.panel(panel),
                                            .depth = weights.depth(),
                                            .column_sums = weights.column_sums() + panel * kPanelOutputs,
                                            .out = nullptr,
                                            .out_stride = 0}});
                    continue;
                }
            kernels.multiply({.digits = digit_rows.digits(index),
                              .stride = digit_rows.depth(),
                              .rows = block.digit_rows,
                              .panel = weights.panel(panel),
                              .depth = weights.depth(),
                              .sums = sums});
            const std::size_t output = panel * kPanelOutputs;
            for (std::size_t row = 0; row < block.rows; ++row) {
                RowSums of_row{.digits = {},
                               .of_row = block.row[row],
                               .row = index * kBlockRows + row,
                               .output = output,
                               .columns = std::min(kPanelOutputs, outputs - output)};
                for (std::size_t d = 0; d < block.row[row].digits; ++d)
                    of_row.digits[d] =
                        sums + (d < base ? row * base + d : block.further[row] + d - base) * kPanelOutputs;
                result(of_row);
            }
        }
    });
}

// Rows of two digits to `most_digits` through a Linear, run by run.
//
//   to_integers: (row, integers [inputs]) -> IntegerRow, of each row once.
//   result:      (first row of the run, const RowSums&), or a PairRun as of multiply_run.
template <class ToIntegers, class Result>
void multiply_rows(const FieldKernels& kernels, const FieldWeights& weights, std::size_t rows,
                   std::size_t most_digits, std::size_t num_threads, const ToIntegers& to_integers,
                   const Result& result) {
    constexpr std::size_t kBase = 2;
    const std::size_t inputs = weights.inputs(), depth = weights.depth();
    const std::size_t most_blocks = blocks_of_a_run(depth, kBase);
    RunScratch& scratch = RunScratch::of_this_thread();
    DigitRows& digit_rows = scratch.digit_rows;
    digit_rows.reserve(std::min(most_blocks, blocks_of_rows(rows)), depth, kBase, most_digits);
    std::int32_t* const all_integers = reserved(scratch.integers, num_threads * depth);
    for (std::size_t first = 0; first < rows; first += most_blocks * kBlockRows) {
        const std::size_t of_run = std::min(rows - first, most_blocks * kBlockRows),
                          num_blocks = blocks_of_rows(of_run);
        parallel_rows(num_blocks, 1, num_threads,
                      [&](std::size_t worker, std::size_t begin, std::size_t end) {
                          std::int32_t* const integers = all_integers + worker * depth;
                          for (std::size_t index = begin; index < end; ++index) {
                              const std::size_t from = index * kBlockRows;
                              const DigitBlock& block =
                                  digit_rows.begin_block(index, std::min(kBlockRows, of_run - from));
                              for (std::size_t row = 0; row < block.rows; ++row) {
                                  const IntegerRow of_row = to_integers(first + from + row, integers);
                                  digit_rows.add_row(kernels, index, row, of_row, integers, inputs);
                              }
                          }
                      });
        multiply_run(kernels, weights, digit_rows, num_blocks, num_threads,
                     [&](const auto& sums)
                         requires std::is_invocable_v<Result, std::size_t, decltype(sums)>
                     { result(first, sums); });
    }
}

}  // namespace tsqp
