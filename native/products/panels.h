// Products with a packed right-hand side: the GPU process's arithmetic where its device is the CPU.
//
// A matrix B [K, N] lies packed in panels of 32 columns, and within a panel in pairs along K:
//
//     panel p, pair j, column c, half h   =   B[2j + h, 32p + c]        bf16, the last panel padded with
//     zeros
//
// Both the dot-product and the tile instructions for bf16 take pairs, and one panel is one run of memory, so
// the same weights serve a prompt of a thousand rows and the one row of decode; the KV cache lies the same
// way, so attention is the same product. Nothing here runs in the TEE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace tsqp {

inline constexpr std::size_t kPanelColumns = 32;
// K of every product is a multiple of this: the depth of a tile.
inline constexpr std::size_t kDepthBlock = 32;
// A cache lies in blocks of this many keys (packed_cache.h).
inline constexpr std::size_t kKeyBlock = 64;

constexpr std::size_t num_panels(std::size_t columns) {
    return (columns + kPanelColumns - 1) / kPanelColumns;
}

// out[r, n] = sum_k a[r, k] B[k, n] + bias[n], rounded once, or not at all where `out` is f32.
//
//   Shapes:   a [rows, K] bf16 or f32, rows a_stride elements apart; panels as above, panel_stride elements
//             apart; bias [N] or null; out [rows, N] bf16 or f32, rows out_stride elements apart.
//   Numerics: f32 sums of pairs along K in order; denormals count as zero where the instruction set says so.
//             Of f32 rows products are rounded with their sum alone, by fused multiply-adds, as B is widened.
struct PanelArgs {
    const void* a;
    std::size_t a_stride;
    const std::uint16_t* panels;
    std::size_t panel_stride;
    const std::uint16_t* bias;
    void* out;
    std::size_t out_stride;
    std::size_t rows, depth, columns;
    // Where K is cut and this is one of its blocks (kernels with `cuts_depth`): the call's sums_elements(),
    // which go from each block to the next; the last one writes `out`. Null: K is whole.
    float* sums = nullptr;
    bool is_first = true, is_last = true;
    // Where B's rows lie in blocks of kKeyBlock: the panels of its block b begin blocks[b] * block_stride
    // elements behind `panels`. Null: all of K is one block.
    const std::int32_t* blocks = nullptr;
    std::size_t block_stride = 0;
    bool a_is_f32 = false, out_is_f32 = false;
};

namespace {  // kernels of several instruction sets compile it: see kernels/lanes.h

// B's rows [k, end_of_block) lie in one block, of which k is the first.
inline std::size_t end_of_block(const PanelArgs& a, std::size_t k) {
    return a.blocks == nullptr || a.depth - k < kKeyBlock ? a.depth : k + kKeyBlock;
}

// A panel's pairs in that block.
inline const std::uint16_t* block_of(const PanelArgs& a, std::size_t panel, std::size_t k) {
    const std::size_t block = a.blocks == nullptr ? 0 : static_cast<std::size_t>(a.blocks[k / kKeyBlock]);
    return a.panels + panel * a.panel_stride + block * a.block_stride;
}

template <class Element>
const Element* row_of(const PanelArgs& a, std::size_t row) {
    return static_cast<const Element*>(a.a) + row * a.a_stride;
}

// Where the results of a row of a panel lie.
inline void* results_of(const PanelArgs& a, std::size_t row, std::size_t panel) {
    const std::size_t element = row * a.out_stride + panel * kPanelColumns;
    return static_cast<std::byte*>(a.out) + element * (a.out_is_f32 ? sizeof(float) : sizeof(std::uint16_t));
}

}  // namespace

constexpr std::size_t sums_elements(std::size_t rows, std::size_t panels) {
    return (rows + 31) / 32 * 32 * panels * kPanelColumns;
}

struct PanelKernels {
    const char* name;
    bool cuts_depth;
    // The panels [begin, end) of the product.
    void (*product)(const PanelArgs& args, std::size_t begin, std::size_t end) noexcept;
};

extern const PanelKernels kAvx2Panels, kAvx512Bf16Panels, kAmxPanels;

// What this machine can run, slowest first; may be none.
std::vector<const PanelKernels*> supported_panel_kernels();

// What goes with an instruction set. Null: a GEMM library does better. Raises invalid_argument for a set that
// this machine does not have.
const PanelKernels* panel_kernels_of(std::string_view instruction_set);

// weight [N, K], row-major, as B = weight^T  ->  panels, num_panels(N) * K * 32 elements.
void pack_panels(const std::uint16_t* weight, std::size_t columns, std::size_t depth, std::uint16_t* panels);

}  // namespace tsqp
