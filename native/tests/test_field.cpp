// The products of `w8` against plain 64-bit integers, on arrays that end before an unreadable page, for every
// instruction set that this machine has; and a whole Linear against the scalar one, on one and two threads.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/thread_pool.h"
#include "field/linear.h"
#include "field/quantise.h"
#include "guarded.h"

using namespace tsqp;

namespace {

std::mt19937 random_bits(7);

// Products read whole cache lines of weights and sums: both begin and end with one.
void test_multiply(const FieldKernels& kernels, std::size_t rows, std::size_t depth, std::size_t gap,
                   bool extreme) {
    const std::size_t stride = depth + gap;
    Guarded<std::uint8_t> digits((rows - 1) * stride + depth);
    Guarded<std::int8_t> panel(depth * kPanelOutputs);
    Guarded<std::uint32_t> sums(rows * kPanelOutputs);
    for (std::uint8_t& digit : digits) digit = extreme ? 255 : static_cast<std::uint8_t>(random_bits());
    for (std::size_t i = 0; i < panel.size(); ++i)
        panel[i] = static_cast<std::int8_t>(extreme ? (i / 4 % 2 == 0 ? 127 : -127)
                                                    : static_cast<int>(random_bits() % 255) - 127);
    kernels.multiply({.digits = digits.data(),
                      .stride = stride,
                      .rows = rows,
                      .panel = panel.data(),
                      .depth = depth,
                      .sums = sums.data()});
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t c = 0; c < kPanelOutputs; ++c) {
            std::int64_t sum = 0;
            for (std::size_t k = 0; k < depth; ++k)
                sum +=
                    std::int64_t{digits[row * stride + k]} * panel[(k / 4 * kPanelOutputs + c) * 4 + k % 4];
            CHECK(static_cast<std::int32_t>(sums[row * kPanelOutputs + c]) == sum);
        }
}

// One to four digits of numbers that fill them, put together again.
void test_result(const FieldKernels& kernels, std::size_t num_digits, std::size_t columns, bool has_bias) {
    Guarded<float> scales(kPanelOutputs), bias(kPanelOutputs), out(columns);
    Guarded<std::int32_t> column_sums(kPanelOutputs), expected(kPanelOutputs);
    Guarded<std::uint32_t> digits(kMaxDigits * kPanelOutputs);
    const std::uint32_t offset = std::uint32_t{1} << (8 * num_digits - 1);
    std::normal_distribution<float> normal;
    for (std::size_t c = 0; c < kPanelOutputs; ++c) {
        scales[c] = std::abs(normal(random_bits)), bias[c] = normal(random_bits);
        column_sums[c] = static_cast<std::int32_t>(random_bits());
        std::uint32_t y = offset * (0 - static_cast<std::uint32_t>(column_sums[c]));
        for (std::size_t d = 0; d < num_digits; ++d) {
            const auto sum = static_cast<std::uint32_t>(random_bits());
            digits[d * kPanelOutputs + c] = sum;
            y += sum << (8 * d);
        }
        expected[c] = static_cast<std::int32_t>(y);
    }
    ResultArgs args{.digits = {},
                    .num_digits = num_digits,
                    .offset = offset,
                    .column_sums = column_sums.data(),
                    .scales = scales.data(),
                    .bias = has_bias ? bias.data() : nullptr,
                    .scale = 0.3f,
                    .out = out.data(),
                    .columns = columns};
    for (std::size_t d = 0; d < num_digits; ++d) args.digits[d] = digits.data() + d * kPanelOutputs;
    kernels.result(args);
    for (std::size_t c = 0; c < columns; ++c) {
        const float factor = scales[c] / args.scale, product = static_cast<float>(expected[c]) * factor;
        CHECK(out[c] == (has_bias ? product + bias[c] : product));
    }
    args.scale = std::numeric_limits<float>::quiet_NaN();
    kernels.result(args);
    for (const float result : out) CHECK(std::bit_cast<std::uint32_t>(result) == 0x7FC00000);
}

void fill(Guarded<float>& array, std::size_t row) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < array.size(); ++i) {
        array[i] = normal(random_bits);
        // Every fifth row has a peak, and with it three digits.
        if (i % row == 1 && i / row % 5 == 0) array[i] *= 1e4f;
    }
}

// Weights in two pieces, rows that fill some blocks and a part of one: each table gives the scalar one's
// bits.
void test_linear(const FieldKernels& kernels, std::size_t rows, std::size_t outputs, std::size_t inputs) {
    Guarded<float> x(rows * inputs), weight(outputs * inputs), bias(outputs), out(rows * outputs),
        expected(rows * outputs);
    fill(x, inputs), fill(weight, inputs), fill(bias, outputs);
    const std::size_t first = outputs / 3;
    for (const auto& [table, to] : {std::pair{&kScalarField, &expected}, {&kernels, &out}}) {
        FieldWeights weights(outputs, inputs);
        weights.set_rows(*table, 0, first, weight.data());
        weights.set_rows(*table, first, outputs - first, weight.data() + first * inputs);
        weights.set_bias(bias.data());
        Guarded<std::int8_t> bytes(inputs);
        weights.unpack(outputs - 1, 1, bytes.data());
        CHECK(*std::max_element(bytes.begin(), bytes.end()) <= 127);
        CHECK(*std::min_element(bytes.begin(), bytes.end()) >= -127);
        apply_linear(*table, weights, x.data(), rows, to->data());
    }
    CHECK(std::memcmp(expected.data(), out.data(), out.size() * sizeof(float)) == 0);
}

// A row alone has the bits that it has among others, whatever lies behind it.
void test_rows_alone(const FieldKernels& kernels) {
    constexpr std::size_t kRows = 2 * kBlockRows + 5, kOutputs = 65, kInputs = 130;
    Guarded<float> x(kRows * kInputs), weight(kOutputs * kInputs), together(kRows * kOutputs),
        alone(kOutputs);
    fill(x, kInputs), fill(weight, kInputs);
    FieldWeights weights(kOutputs, kInputs);
    weights.set_rows(kernels, 0, kOutputs, weight.data());
    apply_linear(kernels, weights, x.data(), kRows, together.data());
    for (std::size_t row = 0; row < kRows; ++row) {
        apply_linear(kernels, weights, x.data() + row * kInputs, 1, alone.data());
        CHECK(std::memcmp(alone.data(), together.data() + row * kOutputs, kOutputs * sizeof(float)) == 0);
    }
}

}  // namespace

int main() {
    for (const FieldKernels* kernels : supported_field_kernels()) {
        for (const std::size_t rows : {1, 2, 3, 4, 5, 6, 7, 11, 12, 16, 17, 31, 32, 33, 49, 144})
            for (const std::size_t depth : {64, 128, 576})
                for (const std::size_t gap : {0, 64}) test_multiply(*kernels, rows, depth, gap, false);
        test_multiply(*kernels, 3, kMaxFieldInputs / kDepthOfTile * kDepthOfTile, 0, true);
        for (std::size_t digits = 1; digits <= kMaxDigits; ++digits)
            for (const std::size_t columns : {1, 15, 16, 17, 63, 64}) {
                test_result(*kernels, digits, columns, false);
                test_result(*kernels, digits, columns, true);
            }
        for (const std::size_t threads : {1, 2}) {
            set_num_threads(threads);
            for (const std::size_t rows : {1, 7, 48, 49, 150})
                for (const std::size_t outputs : {3, 64, 200})
                    for (const std::size_t inputs : {1, 64, 577})
                        test_linear(*kernels, rows, outputs, inputs);
            // More than one run of rows.
            test_linear(*kernels, 150, 64, 8190);
            test_rows_alone(*kernels);
        }
    }
    std::puts("field: ok");
}
