// The products of `w8` against plain 64-bit integers, on arrays that end before an unreadable page, for every
// instruction set that this machine has; and a whole Linear against the scalar one, and one in the field against
// 64-bit integers, on one and two threads.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
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

std::int64_t modulo(std::int64_t x) {
    const std::int64_t rest = x % kPrime;
    return rest < 0 ? rest + kPrime : rest;
}

// One to four digits of any sums that digit rows may have, and of a y that fits 32 bits.
void test_residue(const FieldKernels& kernels, std::size_t num_digits, std::size_t columns, bool is_narrow) {
    Guarded<std::int32_t> column_sums(kPanelOutputs);
    Guarded<std::uint32_t> digits(kMaxDigits * kPanelOutputs), out(columns);
    Guarded<std::int64_t> expected(kPanelOutputs);
    for (std::size_t c = 0; c < kPanelOutputs; ++c) {
        const auto most = static_cast<std::int32_t>(kMaxFieldInputs * 127);
        column_sums[c] = c < 2 ? (c == 0 ? most : -most) : static_cast<std::int32_t>(random_bits()) % most;
        const std::int64_t taken_off = std::int64_t{column_sums[c]} << (8 * num_digits - 1);
        std::int64_t sum = 0;
        for (std::size_t d = num_digits; d-- > 0;) {
            std::int32_t of_digit = static_cast<std::int32_t>(random_bits());
            if (c < 4) of_digit = c % 2 == 0 ? std::numeric_limits<std::int32_t>::min() : INT32_MAX;
            digits[d * kPanelOutputs + c] = static_cast<std::uint32_t>(of_digit);
            sum += std::int64_t{of_digit} * (std::int64_t{1} << (8 * d));
        }
        if (is_narrow) {
            // The lowest digit makes it any y within +-(p - 1), the ends among them.
            const std::int64_t limit = kPrime - 1, y = c == 5   ? limit
                                                       : c == 6 ? -limit
                                                       : c == 7
                                                           ? 0
                                                           : static_cast<std::int32_t>(random_bits()) % limit;
            digits[c] += static_cast<std::uint32_t>(y - (sum - taken_off));
            sum = y + taken_off;
        }
        expected[c] = modulo(sum - taken_off);
    }
    ResidueArgs args{.digits = {},
                     .num_digits = num_digits,
                     .column_sums = column_sums.data(),
                     .is_narrow = is_narrow,
                     .out = out.data(),
                     .columns = columns};
    for (std::size_t d = 0; d < num_digits; ++d) args.digits[d] = digits.data() + d * kPanelOutputs;
    kernels.residue(args);
    for (std::size_t c = 0; c < columns; ++c) CHECK(out[c] == expected[c]);
}

void test_centre(const FieldKernels& kernels, std::size_t size, std::uint32_t mask) {
    constexpr std::uint32_t kEnds[] = {0,      1,          kPrime / 2,     kPrime / 2 + 1, kPrime - 1,
                                       kPrime, kPrime + 1, 2 * kPrime - 1, 2 * kPrime,     UINT32_MAX};
    Guarded<std::uint32_t> m(size);
    Guarded<std::int32_t> integers(size);
    for (std::size_t i = 0; i < size; ++i)
        m[i] = mask == UINT32_MAX && i < std::size(kEnds) ? kEnds[i]
                                                          : static_cast<std::uint32_t>(random_bits()) & mask;
    const Magnitudes found = kernels.centre(m.data(), size, integers.data());
    std::uint32_t largest = 0;
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < size; ++i) {
        std::int64_t expected = m[i] % kPrime;
        if (expected > kPrime / 2) expected -= kPrime;
        CHECK(integers[i] == expected);
        const auto magnitude = static_cast<std::uint32_t>(std::abs(expected));
        largest = std::max(largest, magnitude), sum += magnitude;
    }
    CHECK(found.largest == largest);
    if (largest <= kThreeDigits) CHECK(found.sum == sum);
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

// Rows of two digits, three and four by turns, up to the largest integers of each and words that are no field
// elements.
void test_field_linear(const FieldKernels& kernels, std::size_t rows, std::size_t outputs,
                       std::size_t inputs) {
    Guarded<float> weight(outputs * inputs);
    Guarded<std::uint32_t> m(rows * inputs), y(rows * outputs);
    fill(weight, inputs);
    FieldWeights weights(outputs, inputs);
    weights.set_rows(kernels, 0, outputs, weight.data());
    Guarded<std::int8_t> bytes(outputs * inputs);
    weights.unpack(0, outputs, bytes.data());
    for (std::size_t row = 0; row < rows; ++row) {
        const std::uint32_t bounds[] = {kTwoDigits, kThreeDigits, kPrime / 2, kTwoDigits};
        const auto bound = std::int64_t{bounds[row % 4]};
        for (std::size_t k = 0; k < inputs; ++k) {
            const std::int64_t ends[] = {bound, -bound,
                                         static_cast<std::int32_t>(random_bits()) % (bound + 1)};
            const auto word = static_cast<std::uint32_t>(modulo(ends[row / 4 % 3]));
            m[row * inputs + k] = row % 5 == 4 ? word + kPrime : word;
        }
    }
    multiply_linear(kernels, weights, m.data(), rows, y.data());
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t j = 0; j < outputs; ++j) {
            std::int64_t sum = 0;
            for (std::size_t k = 0; k < inputs; ++k)
                sum += std::int64_t{m[row * inputs + k]} * bytes[j * inputs + k];
            CHECK(y[row * outputs + j] == modulo(sum));
        }
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
                test_residue(*kernels, digits, columns, false);
                test_residue(*kernels, digits, columns, true);
            }
        for (const std::size_t size : {1, 7, 16, 255, 256, 257, 600})
            for (const std::uint32_t mask : {0x7Fu, 0x7FFFFu, UINT32_MAX}) test_centre(*kernels, size, mask);
        for (const std::size_t threads : {1, 2}) {
            set_num_threads(threads);
            for (const std::size_t rows : {1, 7, 48, 49, 150})
                for (const std::size_t outputs : {3, 64, 200})
                    for (const std::size_t inputs : {1, 64, 577})
                        test_linear(*kernels, rows, outputs, inputs),
                            test_field_linear(*kernels, rows, outputs, inputs);
            // More than one run of rows.
            test_linear(*kernels, 150, 64, 8190);
            test_field_linear(*kernels, 150, 3, 8190);
            test_rows_alone(*kernels);
        }
    }
    std::puts("field: ok");
}
