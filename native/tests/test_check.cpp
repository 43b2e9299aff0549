// Checks of products: each instruction set's kernels against the scalar ones, on arrays that end before an
// unreadable page; Ws = W^T s against 64-bit integers; and whole checks on one and two threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/thread_pool.h"
#include "field/check.h"
#include "field/check_vectors.h"
#include "guarded.h"

using namespace tsqp;

namespace {

std::mt19937 random_bits(11);
constexpr std::int32_t kMost = kPrime / 2;

std::uint32_t random_word() { return static_cast<std::uint32_t>(random_bits() % kPrime); }

template <class T>
bool equal(const Guarded<T>& a, const Guarded<T>& b) {
    return std::memcmp(const_cast<Guarded<T>&>(a).data(), const_cast<Guarded<T>&>(b).data(),
                       a.size() * sizeof(T)) == 0;
}

// Words begin with an aligned word of 8 bytes and are backed to the end of the last one.
void test_take(const CheckKernels& kernels, std::size_t size, bool has_bias, bool has_pads, float scale) {
    const std::size_t padded = padded_to_step(size);
    Guarded<std::uint32_t> words((size + 1) / 2 * 2);
    Guarded<float> scales(padded), bias(padded), out(size), expected_out(size);
    Guarded<std::int32_t> integers(padded), expected(padded);
    std::uniform_real_distribution<float> exponents(-120.0f, 120.0f);
    for (std::size_t i = 0; i < padded; ++i) {
        scales[i] = std::exp2(exponents(random_bits));
        bias[i] = std::exp2(exponents(random_bits));
    }
    for (std::uint32_t& word : words) word = random_word();
    const std::uint32_t corners[] = {0, 1, kMost, kMost + 1, kPrime - 1, kPrime, 1u << 31, UINT32_MAX};
    if (size > 20) std::copy(std::begin(corners), std::end(corners), words.begin() + 3);
    Guarded<std::uint32_t> pads(size);
    for (std::uint32_t& pad : pads) pad = random_word();
    // Each word that is one of the field's, with each pad that there may be at its ends.
    for (std::size_t i = 3; i < std::min<std::size_t>(size, 33); ++i)
        pads[i] =
            std::array{0u, 1u, kPrime / 2, kPrime - 1, kPrime - words[i] % kPrime, random_word()}[i % 6] %
            kPrime;
    const auto run = [&](const CheckKernels& by, Guarded<std::int32_t>& to, Guarded<float>& floats) {
        std::fill(to.begin(), to.end(), 77);
        return by.take({.words = words.data(),
                        .size = size,
                        .pads = has_pads ? pads.data() : nullptr,
                        .scales = scales.data(),
                        .bias = has_bias ? bias.data() : nullptr,
                        .scale = scale,
                        .integers = to.data(),
                        .out = floats.data()});
    };
    const std::uint32_t largest = run(kernels, integers, out);
    CHECK(largest == run(kScalarCheck, expected, expected_out));
    CHECK(largest == *std::max_element(words.data(), words.data() + size));
    CHECK(equal(integers, expected) && equal(out, expected_out));
    for (std::size_t i = size; i < padded; ++i) CHECK(integers[i] == 0);
    for (std::size_t i = 0; i < size; ++i) {
        if (words[i] >= kPrime) continue;
        CHECK(integers[i] == centred(words[i]));
        const std::uint64_t sum = std::uint64_t{words[i]} + (has_pads ? pads[i] : 0);
        float result =
            static_cast<float>(centred(residue(static_cast<std::int64_t>(sum)))) * (scales[i] / scale);
        if (has_bias) result = result + bias[i];
        CHECK(result == out[i] || (std::isnan(result) && std::isnan(out[i])));
    }
}

void test_write_residues(const CheckKernels& kernels, std::size_t size) {
    Guarded<std::int32_t> integers(size);
    Guarded<std::uint32_t> words(size);
    for (std::int32_t& integer : integers)
        integer = static_cast<std::int32_t>(random_bits() % (2 * kThreeDigits)) -
                  static_cast<std::int32_t>(kThreeDigits);
    kernels.write_residues(integers.data(), size, words.data());
    for (std::size_t i = 0; i < size; ++i) CHECK(words[i] == residue(integers[i]));
}

// All products of one sign and as large as they come, or any.
void test_dots(const CheckKernels& kernels, std::size_t rows, std::size_t vectors, std::size_t size,
               bool extreme) {
    const std::size_t row_stride = size + kCheckStep, vector_stride = size + 3;
    Guarded<std::int32_t> row((rows - 1) * row_stride + size), vector((vectors - 1) * vector_stride + size);
    for (Guarded<std::int32_t>* array : {&row, &vector})
        for (std::int32_t& each : *array) each = extreme ? kMost : centred(random_word());
    if (extreme && size % 128 == 0)
        for (std::int32_t& each : row) each = -kMost;
    std::vector<std::int64_t> sums(rows * vectors, 5);
    kernels.dots({.rows = row.data(),
                  .row_stride = row_stride,
                  .num_rows = rows,
                  .vectors = vector.data(),
                  .vector_stride = vector_stride,
                  .num_vectors = vectors,
                  .size = size,
                  .sums = sums.data()});
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t v = 0; v < vectors; ++v) {
            std::int64_t sum = 5;
            for (std::size_t i = 0; i < size; ++i)
                sum = (sum + std::int64_t{row[r * row_stride + i]} * vector[v * vector_stride + i]) % kPrime;
            const std::int64_t found = sums[r * vectors + v];
            CHECK(residue(found) == residue(sum) && std::abs(found) < std::int64_t{1} << 37);
        }
}

void test_vectors(const CheckKernels& kernels, std::size_t outputs, std::size_t inputs,
                  std::size_t num_vectors, bool extreme) {
    FieldWeights weights(outputs, inputs);
    std::vector<float> weight(outputs * inputs);
    std::normal_distribution<float> normal;
    for (float& each : weight) each = extreme ? 1.0f : normal(random_bits);
    weights.set_rows(kScalarField, 0, outputs, weight.data());
    const std::size_t padded = padded_to_step(outputs), depth = weights.depth();
    std::vector<std::int32_t> vectors(num_vectors * padded), products(num_vectors * depth, 99);
    // Low digits of -2^15 are the largest there are.
    for (std::size_t v = 0; v < num_vectors; ++v)
        for (std::size_t i = 0; i < outputs; ++i)
            vectors[v * padded + i] =
                extreme ? (v % 2 == 0 ? -kMost + 0x7FFF : kMost) : centred(random_word());
    multiply_vectors(kernels, weights, vectors.data(), num_vectors, products.data());
    std::vector<std::int8_t> bytes(outputs * inputs);
    weights.unpack(0, outputs, bytes.data());
    for (std::size_t v = 0; v < num_vectors; ++v)
        for (std::size_t k = 0; k < depth; ++k) {
            std::int64_t sum = 0;  // of products below 2^37
            for (std::size_t i = 0; i < outputs && k < inputs; ++i)
                sum += std::int64_t{bytes[i * inputs + k]} * vectors[v * padded + i];
            CHECK(products[v * depth + k] == centred(residue(sum)));
        }
}

// Rows of odd widths, of which some begin inside a word, and a row that is no number.
void test_check(const FieldKernels& field, const CheckKernels& kernels, std::size_t rows, std::size_t outputs,
                std::size_t inputs) {
    FieldWeights weights(outputs, inputs);
    std::vector<float> weight(outputs * inputs), bias(outputs, 0.5f);
    std::normal_distribution<float> normal;
    for (float& each : weight) each = normal(random_bits);
    weights.set_rows(field, 0, outputs, weight.data());
    weights.set_bias(bias.data());
    std::vector<std::uint32_t> vectors(2 * outputs);
    for (std::uint32_t& word : vectors) word = random_word();
    const FieldCheck check(kernels, weights, vectors.data(), 2);
    Guarded<float> x(rows * inputs), out(rows * outputs), expected(rows * outputs);
    Guarded<std::uint32_t> m(rows * inputs), y((rows * outputs + 1) / 2 * 2), copy(rows * outputs);
    for (float& each : x) each = normal(random_bits);
    x[x.size() - 1] = std::numeric_limits<float>::infinity();
    Guarded<float> scales(rows);
    Guarded<std::uint32_t> sums(2 * rows);
    check.begin(field, kernels, x.data(), rows, m.data(), scales.data(), sums.data(), nullptr);
    std::vector<std::int8_t> bytes(outputs * inputs);
    weights.unpack(0, outputs, bytes.data());
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t j = 0; j < outputs; ++j) {
            std::int64_t sum = 0;
            for (std::size_t k = 0; k < inputs; ++k)
                sum += std::int64_t{centred(m[row * inputs + k])} * bytes[j * inputs + k];
            y[row * outputs + j] = residue(sum);
            expected[row * outputs + j] =
                static_cast<float>(sum) * (weights.scales()[j] / scales[row]) + bias[j];
        }
    const auto finish = [&](std::uint32_t* to) {
        return check.finish(kernels, y.data(), rows, scales.data(), sums.data(), out.data(), to);
    };
    CHECK(finish(nullptr));
    CHECK(std::memcmp(out.data(), expected.data(), (rows - 1) * outputs * sizeof(float)) == 0);
    CHECK(std::isnan(out[rows * outputs - 1]));
    CHECK(finish(copy.data()) &&
          std::memcmp(copy.data(), y.data(), copy.size() * sizeof(std::uint32_t)) == 0);
    for (const std::size_t at : {std::size_t{0}, outputs - 1, rows * outputs - 1}) {
        const std::uint32_t before = y[at];
        y[at] = (before + 1) % kPrime;
        CHECK(!finish(nullptr));
        y[at] = before + kPrime;
        CHECK(!finish(copy.data()));
        y[at] = before;
    }
    CHECK(finish(nullptr));
}

}  // namespace

int main() {
    const FieldKernels& field = *supported_field_kernels().back();
    for (const CheckKernels* kernels : supported_check_kernels()) {
        constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
        for (const std::size_t size : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 512})
            for (const bool has_bias : {false, true})
                for (const bool has_pads : {false, true})
                    for (const float scale : {1e-38f, 0.3f, 3.7f, 3e38f, kNaN})
                        test_take(*kernels, size, has_bias, has_pads, scale);
        for (const std::size_t size : {2, 6, 8, 14, 16, 18, 30, 34, 578}) test_write_residues(*kernels, size);
        for (const std::size_t rows : {1, 2, 3, 4})
            for (const std::size_t vectors : {1, 2, 3, 4, 5})
                for (const std::size_t size : {64, 128, 576}) {
                    test_dots(*kernels, rows, vectors, size, false);
                    test_dots(*kernels, rows, vectors, size, true);
                }
        for (const std::size_t threads : {1, 2}) {
            set_num_threads(threads);
            for (const std::size_t vectors : {1, 2, 3}) {
                test_vectors(*kernels, 3, 5, vectors, false);
                test_vectors(*kernels, 130, 577, vectors, false);
                // More panels than are summed in 32 bits.
                test_vectors(*kernels, 64 * (2 * kSummedPanels + 1), 260, vectors, true);
            }
            for (const std::size_t rows : {1, 3, 4, 5, 9})
                for (const std::size_t outputs : {1, 65, 1030})
                    test_check(field, *kernels, rows, outputs, 66);
            test_check(field, *kernels, 2, 30'001, 4);
        }
    }
    std::puts("check: ok");
}
