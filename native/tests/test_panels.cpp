// Products of packed panels against double precision, on arrays that end before an unreadable page, for every
// instruction set that this machine has.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>

#include "check.h"
#include "guarded.h"
#include "products/panels.h"

using namespace tsqp;

namespace {

using Bf16 = std::uint16_t;

std::mt19937 random_bits(7);

double exact(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

void fill(Guarded<Bf16>& array) {
    std::normal_distribution<float> normal;
    for (Bf16& element : array)
        element = static_cast<Bf16>(std::bit_cast<std::uint32_t>(normal(random_bits)) >> 16);
}

// Within the rounding of the output, and of the additions in proportion to what was added.
void check_close(Bf16 found, double expected, double magnitude) {
    CHECK(std::abs(exact(found) - expected) <= std::abs(expected) / 256 + 1e-6 * magnitude);
}

// a's rows and out's lie further apart than they are long, as heads do in the rows of a slot.
void test_product(const PanelKernels& kernels, std::size_t rows, std::size_t columns, std::size_t depth,
                  std::size_t gap, bool has_bias, std::size_t depth_block) {
    const std::size_t a_stride = depth + gap, out_stride = columns + gap;
    Guarded<Bf16> a((rows - 1) * a_stride + depth), weight(columns * depth), bias(columns),
        out((rows - 1) * out_stride + columns), panels(num_panels(columns) * kPanelColumns * depth);
    fill(a), fill(weight), fill(bias);
    for (Bf16& element : out) element = 0x1234;
    pack_panels(weight.data(), columns, depth, panels.data());
    const std::size_t middle = num_panels(columns) / 2;
    for (const auto& [begin, end] : {std::pair{std::size_t{0}, middle}, {middle, num_panels(columns)}}) {
        Guarded<float> sums(sums_elements(rows, end - begin));
        for (std::size_t k = 0; k < depth; k += depth_block)
            kernels.product({.a = a.data() + k,
                             .a_stride = a_stride,
                             .panels = panels.data() + k * kPanelColumns,
                             .panel_stride = depth * kPanelColumns,
                             .bias = has_bias ? bias.data() : nullptr,
                             .out = out.data(),
                             .out_stride = out_stride,
                             .rows = rows,
                             .depth = std::min(depth_block, depth - k),
                             .columns = columns,
                             .sums = depth_block < depth ? sums.data() : nullptr,
                             .is_first = k == 0,
                             .is_last = k + depth_block >= depth},
                            begin, end);
    }
    // In f32 it is the same sums, before they are rounded.
    Guarded<float> wide(out.size());
    for (float& element : wide) element = -1.0f;
    if (depth_block >= depth)
        kernels.product({.a = a.data(),
                         .a_stride = a_stride,
                         .panels = panels.data(),
                         .panel_stride = depth * kPanelColumns,
                         .bias = has_bias ? bias.data() : nullptr,
                         .out = wide.data(),
                         .out_stride = out_stride,
                         .rows = rows,
                         .depth = depth,
                         .columns = columns,
                         .out_is_f32 = true},
                        0, num_panels(columns));
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t column = 0; column < out_stride; ++column) {
            if (row * out_stride + column >= out.size()) break;
            const Bf16 found = out[row * out_stride + column];
            const float unrounded = wide[row * out_stride + column];
            if (depth_block >= depth && column < columns)
                CHECK(std::abs(exact(found) - unrounded) <= std::abs(unrounded) / 256);
            else
                CHECK(unrounded == -1.0f);
            if (column >= columns) {
                CHECK(found == 0x1234);
                continue;
            }
            double sum = has_bias ? exact(bias[column]) : 0, magnitude = 1;
            for (std::size_t k = 0; k < depth; ++k) {
                const double term = exact(a[row * a_stride + k]) * exact(weight[column * depth + k]);
                sum += term, magnitude += std::abs(term);
            }
            check_close(found, sum, magnitude);
        }
}

// Rows in f32 are multiplied as they are: nothing is rounded to bf16 but, at the end, what goes there.
void test_float32_rows(const PanelKernels& kernels, std::size_t rows, std::size_t columns, std::size_t depth,
                       std::size_t gap, bool has_bias) {
    const std::size_t a_stride = depth + gap, out_stride = columns + gap;
    Guarded<float> a((rows - 1) * a_stride + depth), wide((rows - 1) * out_stride + columns);
    Guarded<Bf16> weight(columns * depth), bias(columns), narrow(wide.size()),
        panels(num_panels(columns) * kPanelColumns * depth);
    std::normal_distribution<float> normal;
    for (float& element : a) element = normal(random_bits);
    fill(weight), fill(bias);
    pack_panels(weight.data(), columns, depth, panels.data());
    for (const bool out_is_f32 : {true, false})
        kernels.product({.a = a.data(),
                         .a_stride = a_stride,
                         .panels = panels.data(),
                         .panel_stride = depth * kPanelColumns,
                         .bias = has_bias ? bias.data() : nullptr,
                         .out = out_is_f32 ? static_cast<void*>(wide.data()) : narrow.data(),
                         .out_stride = out_stride,
                         .rows = rows,
                         .depth = depth,
                         .columns = columns,
                         .a_is_f32 = true,
                         .out_is_f32 = out_is_f32},
                        0, num_panels(columns));
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t column = 0; column < columns; ++column) {
            double sum = has_bias ? exact(bias[column]) : 0, magnitude = 1;
            for (std::size_t k = 0; k < depth; ++k) {
                const double term =
                    static_cast<double>(a[row * a_stride + k]) * exact(weight[column * depth + k]);
                sum += term, magnitude += std::abs(term);
            }
            CHECK(std::abs(static_cast<double>(wide[row * out_stride + column]) - sum) <= 1e-6 * magnitude);
            check_close(narrow[row * out_stride + column], sum, magnitude);
        }
}

// B in blocks of keys, wherever they lie, gives the bits of B in one piece.
void test_blocks(const PanelKernels& kernels, std::size_t rows, std::size_t columns, std::size_t depth) {
    const std::size_t num_blocks = (depth + kKeyBlock - 1) / kKeyBlock, keys = num_blocks * kKeyBlock,
                      panel_stride = kKeyBlock * kPanelColumns,
                      block_stride = num_panels(columns) * panel_stride;
    Guarded<Bf16> a(rows * depth), weight(columns * keys), panels(num_panels(columns) * kPanelColumns * keys),
        blocks(panels.size()), expected(rows * columns), found(rows * columns);
    Guarded<std::int32_t> table(num_blocks);
    fill(a), fill(weight);
    pack_panels(weight.data(), columns, keys, panels.data());
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random_bits);
    for (std::size_t block = 0; block < num_blocks; ++block)
        for (std::size_t panel = 0; panel < num_panels(columns); ++panel)
            std::copy_n(
                panels.data() + panel * keys * kPanelColumns + block * panel_stride, panel_stride,
                blocks.data() + static_cast<std::size_t>(table[block]) * block_stride + panel * panel_stride);
    PanelArgs args{.a = a.data(),
                   .a_stride = depth,
                   .panels = panels.data(),
                   .panel_stride = keys * kPanelColumns,
                   .bias = nullptr,
                   .out = expected.data(),
                   .out_stride = columns,
                   .rows = rows,
                   .depth = depth,
                   .columns = columns};
    kernels.product(args, 0, num_panels(columns));
    args.panels = blocks.data(), args.panel_stride = panel_stride, args.out = found.data();
    args.blocks = table.data(), args.block_stride = block_stride;
    kernels.product(args, 0, num_panels(columns));
    CHECK(std::equal(expected.begin(), expected.end(), found.begin()));
}

void test_packing() {
    const std::size_t columns = 33, depth = 32;
    Guarded<Bf16> weight(columns * depth), panels(2 * kPanelColumns * depth);
    fill(weight);
    pack_panels(weight.data(), columns, depth, panels.data());
    for (std::size_t column = 0; column < 2 * kPanelColumns; ++column)
        for (std::size_t k = 0; k < depth; ++k) {
            const std::size_t panel = column / kPanelColumns, within = column % kPanelColumns;
            const Bf16 found =
                panels[panel * kPanelColumns * depth + (k / 2 * kPanelColumns + within) * 2 + k % 2];
            CHECK(found == (column < columns ? weight[column * depth + k] : 0));
        }
}

}  // namespace

int main() {
    test_packing();
    for (const PanelKernels* kernels : supported_panel_kernels())
        for (const std::size_t rows : {1, 2, 3, 8, 33})
            for (const std::size_t columns : {32, 64, 128})
                for (const std::size_t depth : {32, 64, 96, 128, 608})
                    test_blocks(*kernels, rows, columns, depth);
    for (const PanelKernels* kernels : supported_panel_kernels())
        for (const std::size_t rows : {1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 47, 48, 65})
            for (const std::size_t columns : {1, 15, 16, 31, 32, 33, 97})
                for (const std::size_t depth : {32, 96, 576})
                    for (const std::size_t gap : {0, 7}) {
                        test_product(*kernels, rows, columns, depth, gap, gap == 0, depth);
                        if (kernels->cuts_depth)
                            test_product(*kernels, rows, columns, depth, gap, gap == 0, 64);
                    }
    for (const PanelKernels* kernels : supported_panel_kernels())
        for (const std::size_t rows : {1, 2, 3, 5, 8, 15, 33})
            for (const std::size_t columns : {1, 31, 32, 33, 97})
                for (const std::size_t depth : {32, 96, 576})
                    for (const std::size_t gap : {0, 7})
                        test_float32_rows(*kernels, rows, columns, depth, gap, gap == 0);
    std::puts("panels: ok");
}
