// Attention's products of `CpuProducts`: scores of tiles, and what probabilities make of the cached values.

#include <algorithm>
#include <vector>

#include "cpu/thread_pool.h"
#include "products/cpu_products.h"
#include "products/elements.h"

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

// Rows of one head that one task scores, and panels of keys for a row of decode.
constexpr std::size_t kScoreRows = 64, kDecodePanels = 32;
constexpr std::size_t kBlockPanels = kKeyBlock / kPanelColumns;

std::size_t round_up(std::size_t size, std::size_t block) { return (size + block - 1) / block * block; }
std::size_t ceil_div(std::size_t size, std::size_t block) { return (size + block - 1) / block; }

// The first block behind `block`, up to `end`, that does not follow on the one before it.
std::size_t end_of_run(const std::int32_t* blocks, std::size_t block, std::size_t end) {
    std::size_t next = block + 1;
    while (next < end && blocks[next] == blocks[next - 1] + 1) ++next;
    return next;
}

}  // namespace

// The segments of a tile with their blocks in the score slot, cut into tasks. In decode the query heads of a
// group are the rows of one product; in prefill each head has rows enough, and tasks of its own.
struct CpuProducts::Tile {
    struct Part {
        const Segment* segment;
        KeyRange keys;
        std::size_t offset;  // of the block in the slot, in elements
        std::size_t first_task, heads_each, tasks_each;
    };
    // Rows [row, row + rows) of `heads` heads from `head` on; in decode each head is a row.
    struct Task {
        const Part& part;
        const Segment& segment;
        std::size_t piece, head, row, rows;
        bool is_decode;
        std::size_t visible;  // how many of the part's keys the last row sees
    };
    std::vector<Part> parts;
    std::size_t num_tasks = 0;

    // One row's attention is short, as most Linears of one row are (packed_linear.cpp).
    std::size_t threads() const {
        const bool is_short = parts.size() == 1 && parts[0].segment->rows == 1;
        return is_short ? num_threads_beside_another() : get_num_threads();
    }

    Task task(std::size_t index) const {
        const auto after =
            std::upper_bound(parts.begin(), parts.end(), index,
                             [](std::size_t at, const Part& part) { return at < part.first_task; });
        const Part& part = *std::prev(after);
        const Segment& segment = *part.segment;
        const std::size_t product = (index - part.first_task) / part.tasks_each;
        const std::size_t piece = (index - part.first_task) % part.tasks_each;
        const std::size_t head = product * part.heads_each;
        if (segment.rows == 1)
            return {part, segment, piece, head, 0, part.heads_each, true, part.keys.columns};
        const std::size_t row = piece * kScoreRows, rows = std::min(kScoreRows, segment.rows - row);
        return {part, segment, piece, head,
                row,  rows,    false, segment.position + row + rows - part.keys.start};
    }
};

CpuProducts::Tile CpuProducts::tile(std::size_t window, std::size_t first_segment, std::size_t num_segments,
                                    const Rows& slot) const {
    const std::vector<KeyRange>& seen = seen_.at(window);
    require(first_segment <= segments_.size() && num_segments <= segments_.size() - first_segment,
            "segments that are not of this step");
    require(is_floating(slot.dtype), "a score slot of another dtype");
    Tile tile;
    tile.parts.reserve(num_segments);
    std::size_t offset = 0;
    for (std::size_t i = first_segment; i < first_segment + num_segments; ++i) {
        const Segment& segment = segments_[i];
        const bool is_decode = segment.rows == 1;
        const std::size_t products = is_decode ? geometry_.num_kv_heads : geometry_.num_heads;
        const std::size_t tasks_each = is_decode ? ceil_div(seen[i].columns, kDecodePanels * kPanelColumns)
                                                 : ceil_div(segment.rows, kScoreRows);
        tile.parts.push_back({&segment, seen[i], offset, tile.num_tasks,
                              is_decode ? geometry_.num_heads / geometry_.num_kv_heads : 1, tasks_each});
        tile.num_tasks += products * tasks_each;
        offset += geometry_.num_heads * segment.rows * seen[i].columns;
        require(offset <= slot.rows * slot.row_elements, "the tile does not fit its slot");
    }
    return tile;
}

void CpuProducts::append(std::size_t layer, const Segment& segment, const Rows& qk) const {
    const CpuGeometry& g = geometry_;
    const std::size_t width = (g.num_heads + g.num_kv_heads) * g.head_dim,
                      kv_width = g.num_kv_heads * g.head_dim;
    std::vector<Bf16> of_row(qk.dtype == Dtype::f32 ? kv_width : 0);
    for (std::size_t row = 0; row < segment.rows; ++row) {
        const std::size_t batch_row = segment.first_row + row,
                          element = batch_row * width + g.num_heads * g.head_dim;
        const Bf16* keys = bf16_elements(qk) + element;
        if (qk.dtype == Dtype::f32) {
            std::transform(f32_elements(qk) + element, f32_elements(qk) + element + kv_width, of_row.begin(),
                           rounded);
            keys = of_row.data();
        }
        for (std::size_t group = 0; group < g.num_kv_heads; ++group)
            cache_.append(layer, group, segment.sequence, segment.position + row, keys + group * g.head_dim,
                          new_values_.data() + batch_row * kv_width + group * g.head_dim);
    }
}

void CpuProducts::scores(std::size_t layer, std::size_t window, std::size_t first_segment,
                         std::size_t num_segments, const Rows& qk, const Rows& out) {
    const CpuGeometry& g = geometry_;
    const std::size_t width = (g.num_heads + g.num_kv_heads) * g.head_dim;
    require(layer < g.num_layers && is_floating(qk.dtype) && qk.row_elements == width,
            "scores takes the slot of q and k");
    const Tile tile = this->tile(window, first_segment, num_segments, out);
    for (const Tile::Part& part : tile.parts)
        require(part.segment->first_row + part.segment->rows <= qk.rows, "a segment lies outside the slot");
    for (const Tile::Part& part : tile.parts) append(layer, *part.segment, qk);
    parallel_rows(tile.num_tasks, 1, tile.threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t task = begin; task < end; ++task) {
            const auto& [part, segment, piece, head, row, rows, is_decode, visible] = tile.task(task);
            const Bf16* const keys = cache_.keys(layer, head * g.num_kv_heads / g.num_heads);
            const std::int32_t* const blocks = cache_.blocks(segment.sequence, part.keys.start);
            const std::size_t query = (segment.first_row + row) * width + head * g.head_dim;
            PanelArgs args{.a = element_of(qk, query),
                           .a_stride = is_decode ? g.head_dim : width,
                           .panels = nullptr,
                           .panel_stride = g.head_dim * kPanelColumns,
                           .bias = nullptr,
                           .out = nullptr,
                           .out_stride = part.keys.columns,
                           .rows = rows,
                           .depth = g.head_dim,
                           .columns = 0,
                           .a_is_f32 = qk.dtype == Dtype::f32,
                           .out_is_f32 = out.dtype == Dtype::f32};
            const std::size_t to = part.offset + (head * segment.rows + row) * part.keys.columns;
            // Of a prompt, softmax looks at no key behind its row's own.
            const std::size_t first = is_decode ? piece * kDecodePanels : 0;
            const std::size_t end_panel =
                std::min(is_decode ? first + kDecodePanels : ceil_div(visible, kPanelColumns),
                         part.keys.columns / kPanelColumns);
            // Blocks that follow on each other are panels that do.
            for (std::size_t panel = first; panel < end_panel;) {
                const std::size_t block = panel / kBlockPanels;
                const std::size_t end_block = end_of_run(blocks, block, ceil_div(end_panel, kBlockPanels));
                const std::size_t end_run = std::min(end_block * kBlockPanels, end_panel);
                args.panels = keys + static_cast<std::size_t>(blocks[block]) * cache_.key_block_stride() +
                              panel % kBlockPanels * args.panel_stride;
                args.out = element_of(out, to + panel * kPanelColumns);
                args.columns = part.keys.columns - panel * kPanelColumns;
                kernels_.product(args, 0, end_run - panel);
                panel = end_run;
            }
        }
    });
}

void CpuProducts::context(std::size_t layer, std::size_t window, std::size_t first_segment,
                          std::size_t num_segments, const Rows& probabilities) {
    const CpuGeometry& g = geometry_;
    const std::size_t width = g.num_heads * g.head_dim;
    require(layer < g.num_layers, "no such layer");
    const Tile tile = this->tile(window, first_segment, num_segments, probabilities);
    const Rows to = heads(0, g.max_tokens, probabilities.dtype);
    const bool is_f32 = probabilities.dtype == Dtype::f32;
    parallel_rows(tile.num_tasks, 1, tile.threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t task = begin; task < end; ++task) {
            const auto& [part, segment, piece, head, row, rows, is_decode, visible] = tile.task(task);
            // A sum over keys is not split: the first of the pieces that scored has all of it.
            if (is_decode && piece > 0) continue;
            const std::int32_t* const blocks = cache_.blocks(segment.sequence, part.keys.start);
            const std::size_t depth = std::min(round_up(visible, kDepthBlock), part.keys.columns);
            const std::size_t num_blocks = ceil_div(depth, kKeyBlock);
            // Blocks that follow on each other are panels in one piece, for which kernels are a little
            // faster.
            const bool is_one_run = end_of_run(blocks, 0, num_blocks) == num_blocks;
            const std::size_t first_block = is_one_run ? static_cast<std::size_t>(blocks[0]) : 0;
            const std::size_t from = part.offset + (head * segment.rows + row) * part.keys.columns;
            const PanelArgs args{.a = element_of(probabilities, from),
                                 .a_stride = part.keys.columns,
                                 .panels = cache_.values(layer, head * g.num_kv_heads / g.num_heads) +
                                           first_block * cache_.value_block_stride(),
                                 .panel_stride = cache_.value_panel_stride(),
                                 .bias = nullptr,
                                 .out = element_of(to, (segment.first_row + row) * width + head * g.head_dim),
                                 .out_stride = is_decode ? g.head_dim : width,
                                 .rows = rows,
                                 .depth = depth,
                                 .columns = g.head_dim,
                                 .blocks = is_one_run ? nullptr : blocks,
                                 .block_stride = cache_.value_block_stride(),
                                 .a_is_f32 = is_f32,
                                 .out_is_f32 = is_f32};
            kernels_.product(args, 0, g.head_dim / kPanelColumns);
        }
    });
}

}  // namespace tsqp
