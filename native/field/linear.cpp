#include "field/linear.h"

#include "field/quantise.h"
#include "field/runs.h"

namespace tsqp {
namespace {

// Puts a row's floats where they belong in the rows of a run.
void put_result(const FieldKernels& kernels, const FieldWeights& weights, const RowSums& sums, float* run) {
    ResultArgs args{.digits = {},
                    .num_digits = sums.of_row.digits,
                    .offset = digit_offset(sums.of_row.digits),
                    .column_sums = weights.column_sums() + sums.output,
                    .scales = weights.scales() + sums.output,
                    .bias = weights.bias() == nullptr ? nullptr : weights.bias() + sums.output,
                    .scale = sums.of_row.scale,
                    .out = run + sums.row * weights.outputs() + sums.output,
                    .columns = sums.columns};
    std::copy_n(sums.digits, kMaxDigits, args.digits);
    kernels.result(args);
}

// The centred integers of a row of field elements.
IntegerRow centre_row(const FieldKernels& kernels, const std::uint32_t* m, std::size_t inputs,
                      std::int32_t* integers) {
    const Magnitudes magnitudes = kernels.centre(m, inputs, integers);
    if (magnitudes.largest > kThreeDigits) return {.digits = 4, .scale = 1.0f, .is_narrow = false};
    return {.digits = magnitudes.largest > kTwoDigits ? std::size_t{3} : std::size_t{2},
            .scale = 1.0f,
            .is_narrow = 127 * magnitudes.sum < kPrime};
}

// Puts a row's field elements where they belong in y.
struct Residues {
    const FieldKernels& kernels;
    const FieldWeights& weights;
    std::uint32_t* y;

    void operator()(std::size_t first, const RowSums& sums) const {
        put_residues(kernels, weights, sums, y + first * weights.outputs());
    }

    void operator()(std::size_t first, const PairRun& run) const {
        PairsArgs args = run.args;
        args.out = y + (first + run.row) * weights.outputs() + run.output;
        args.out_stride = weights.outputs();
        kernels.multiply_pairs(args);
    }
};

// Whether rows take four digits, as blinded ones do. A guess, of which only the number of threads depends.
bool has_four_digits(const std::uint32_t* m, std::size_t inputs) {
    return std::any_of(m, m + std::min<std::size_t>(inputs, 64), [](std::uint32_t word) {
        return word > kThreeDigits && kPrime - word > kThreeDigits;
    });
}

}  // namespace

void apply_linear(const FieldKernels& kernels, const FieldWeights& weights, const float* x, std::size_t rows,
                  float* out) {
    const std::size_t inputs = weights.inputs(), outputs = weights.outputs();
    const std::uint64_t limit = squares_limit(weights.squares());
    multiply_rows(
        kernels, weights, rows, 3, get_num_threads(),
        [&](std::size_t row, std::int32_t* integers) {
            const QuantisedRow quantised = quantise_row(kernels, x + row * inputs, inputs, limit, integers);
            return IntegerRow{.digits = quantised.digits, .scale = quantised.scale, .is_narrow = true};
        },
        [&](std::size_t first, const RowSums& sums) {
            put_result(kernels, weights, sums, out + first * outputs);
        });
}

void multiply_linear(const FieldKernels& kernels, const FieldWeights& weights, const std::uint32_t* m,
                     std::size_t rows, std::uint32_t* y) {
    const std::size_t inputs = weights.inputs();
    // Of many rows there are other blocks in flight, and the TEE's thread is at work on one of them, but that
    // products of four digits take twice as long as it does; of few, it sleeps while a long product lasts.
    const bool has_core = rows > kBlockRows
                              ? !has_four_digits(m, inputs)
                              : weights.num_panels() * weights.panel_bytes() < kShortProductBytes;
    multiply_rows(
        kernels, weights, rows, kMaxDigits, has_core ? num_threads_beside_another() : get_num_threads(),
        [&](std::size_t row, std::int32_t* integers) {
            return centre_row(kernels, m + row * inputs, inputs, integers);
        },
        Residues{kernels, weights, y});
}

void multiply_blocks(const FieldKernels& kernels, const FieldWeights& weights, const DigitRows& digit_rows,
                     std::size_t num_blocks, float* out) {
    multiply_run(kernels, weights, digit_rows, num_blocks, get_num_threads(),
                 [&](const RowSums& sums) { put_result(kernels, weights, sums, out); });
}

}  // namespace tsqp
