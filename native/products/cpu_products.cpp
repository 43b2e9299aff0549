#include "products/cpu_products.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/thread_pool.h"

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

Bf16* elements(const Rows& rows) { return reinterpret_cast<Bf16*>(rows.data); }

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
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

namespace {

const PanelKernels& kernels_or_raise(std::string_view instruction_set) {
    const PanelKernels* kernels = panel_kernels_of(instruction_set);
    require(kernels != nullptr, "this instruction set has no kernels for packed products");
    return *kernels;
}

}  // namespace

CpuProducts::CpuProducts(const CpuGeometry& g, std::vector<std::int32_t> blocks,
                         std::string_view instruction_set)
    : geometry_(g),
      kernels_(kernels_or_raise(instruction_set)),
      layers_(g.num_layers),
      cache_(g.num_layers, g.num_kv_heads, g.head_dim, g.max_sequences, std::move(blocks)) {
    for (const std::size_t width : {g.hidden, g.intermediate, g.head_dim, g.num_heads * g.head_dim})
        require(width > 0 && width % kDepthBlock == 0, "packed products take widths of whole blocks of 32");
    require(g.num_kv_heads > 0 && g.num_heads % g.num_kv_heads == 0, "query heads do not divide into groups");
    const std::size_t kv_width = g.num_kv_heads * g.head_dim;
    new_values_ = Pages<std::uint16_t>(g.max_tokens * kv_width, false);
    heads_ = Pages<std::uint16_t>(g.max_tokens * g.num_heads * g.head_dim, false);
}

void CpuProducts::set_linear(std::size_t layer, Linear which, PackedLinear linear) {
    const CpuGeometry& g = geometry_;
    const std::size_t q = g.num_heads * g.head_dim, kv = g.num_kv_heads * g.head_dim;
    const std::size_t shapes[5][2] = {{q + kv, g.hidden},
                                      {kv, g.hidden},
                                      {g.hidden, q},
                                      {2 * g.intermediate, g.hidden},
                                      {g.hidden, g.intermediate}};
    const auto& [columns, depth] = shapes[static_cast<std::size_t>(which)];
    require(linear.columns() == columns && linear.depth() == depth, "a weight of another shape");
    layers_.at(layer).linears[static_cast<std::size_t>(which)] = std::move(linear);
}

void CpuProducts::set_embedding(const Bf16* embedding, std::size_t rows, std::size_t columns) {
    require(rows == geometry_.vocabulary && columns == geometry_.hidden, "an embedding of another shape");
    embedding_ = embedding;
}

void CpuProducts::set_lm_head(PackedLinear linear) {
    require(linear.columns() == geometry_.vocabulary && linear.depth() == geometry_.hidden,
            "a weight of another shape");
    lm_head_ = std::move(linear);
}

void CpuProducts::begin_step(std::vector<Segment> segments, std::vector<std::vector<KeyRange>> seen) {
    const CpuGeometry& g = geometry_;
    for (const Segment& s : segments)
        require(s.sequence < g.max_sequences && s.rows > 0 && s.position < g.max_keys &&
                    s.rows <= g.max_keys - s.position && s.first_row < g.max_tokens &&
                    s.rows <= g.max_tokens - s.first_row,
                "a segment lies outside the cache or the batch");
    for (const auto& of_window : seen) {
        require(of_window.size() == segments.size(), "a segment without its keys");
        for (std::size_t i = 0; i < segments.size(); ++i) {
            const KeyRange keys = of_window[i];
            const std::size_t end = segments[i].position + segments[i].rows;
            require(keys.start % kKeyBlock == 0 && keys.columns % kKeyBlock == 0 &&
                        keys.start <= segments[i].position && keys.columns <= g.max_keys &&
                        keys.start <= g.max_keys - keys.columns && end <= keys.start + keys.columns,
                    "keys outside the cache");
        }
    }
    segments_ = std::move(segments);
    seen_ = std::move(seen);
}

void CpuProducts::embed(const Rows& tokens, const Rows& hidden) const {
    require(tokens.dtype == Dtype::i32 && tokens.row_elements == 1 && hidden.dtype == Dtype::bf16 &&
                hidden.row_elements == geometry_.hidden && tokens.rows == hidden.rows &&
                embedding_ != nullptr,
            "embed takes token ids and gives hidden rows");
    for (std::size_t row = 0; row < tokens.rows; ++row) {
        std::int32_t token;
        std::memcpy(&token, tokens.data + row * sizeof token, sizeof token);
        if (token < 0 || static_cast<std::size_t>(token) >= geometry_.vocabulary)
            throw std::out_of_range("token " + std::to_string(token) + " is not in the vocabulary");
        std::memcpy(elements(hidden) + row * geometry_.hidden,
                    embedding_ + static_cast<std::size_t>(token) * geometry_.hidden,
                    geometry_.hidden * sizeof(Bf16));
    }
}

void CpuProducts::apply(const PackedLinear& linear, const Rows& x, const Rows& out) const {
    require(x.dtype == Dtype::bf16 && is_floating(out.dtype) && x.rows == out.rows &&
                x.row_elements == linear.depth() && out.row_elements == linear.columns(),
            "the slots' rows do not fit the weight");
    linear.apply(kernels_, elements(x), x.rows, out.data, out.dtype == Dtype::f32);
}

void CpuProducts::linear(std::size_t layer, Linear which, const Rows& x, const Rows& out) const {
    apply(layers_.at(layer).linears[static_cast<std::size_t>(which)], x, out);
}

void CpuProducts::lm_head(const Rows& x, const Rows& out) const { apply(lm_head_, x, out); }

void CpuProducts::qkv(std::size_t layer, std::size_t first_row, const Rows& x, const Rows& qk) {
    linear(layer, Linear::qk, x, qk);
    const std::size_t width = geometry_.num_kv_heads * geometry_.head_dim;
    require(first_row <= geometry_.max_tokens && x.rows <= geometry_.max_tokens - first_row,
            "rows outside the batch");
    layers_[layer].linears[static_cast<std::size_t>(Linear::v)].apply(
        kernels_, elements(x), x.rows, new_values_.data() + first_row * width, false);
}

void CpuProducts::output(std::size_t layer, std::size_t first_row, const Rows& hidden) const {
    const std::size_t width = geometry_.num_heads * geometry_.head_dim;
    require(first_row <= geometry_.max_tokens && hidden.rows <= geometry_.max_tokens - first_row,
            "rows outside the batch");
    const Rows heads{reinterpret_cast<std::byte*>(heads_.data() + first_row * width), hidden.rows, width,
                     Dtype::bf16};
    linear(layer, Linear::o, heads, hidden);
}

CpuProducts::Tile CpuProducts::tile(std::size_t window, std::size_t first_segment, std::size_t num_segments,
                                    const Rows& slot) const {
    const std::vector<KeyRange>& seen = seen_.at(window);
    require(first_segment <= segments_.size() && num_segments <= segments_.size() - first_segment,
            "segments that are not of this step");
    require(slot.dtype == Dtype::bf16, "a score slot of another dtype");
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

void CpuProducts::append(std::size_t layer, const Segment& segment, const Bf16* qk) const {
    const CpuGeometry& g = geometry_;
    const std::size_t width = (g.num_heads + g.num_kv_heads) * g.head_dim,
                      kv_width = g.num_kv_heads * g.head_dim;
    for (std::size_t group = 0; group < g.num_kv_heads; ++group)
        for (std::size_t row = 0; row < segment.rows; ++row) {
            const std::size_t batch_row = segment.first_row + row;
            cache_.append(layer, group, segment.sequence, segment.position + row,
                          qk + batch_row * width + (g.num_heads + group) * g.head_dim,
                          new_values_.data() + batch_row * kv_width + group * g.head_dim);
        }
}

void CpuProducts::scores(std::size_t layer, std::size_t window, std::size_t first_segment,
                         std::size_t num_segments, const Rows& qk, const Rows& out) {
    const CpuGeometry& g = geometry_;
    const std::size_t width = (g.num_heads + g.num_kv_heads) * g.head_dim;
    require(layer < g.num_layers && qk.dtype == Dtype::bf16 && qk.row_elements == width &&
                qk.rows >= g.max_tokens,
            "scores takes the slot of q and k");
    const Tile tile = this->tile(window, first_segment, num_segments, out);
    for (const Tile::Part& part : tile.parts) append(layer, *part.segment, elements(qk));
    parallel_rows(tile.num_tasks, 1, tile.threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t task = begin; task < end; ++task) {
            const auto& [part, segment, piece, head, row, rows, is_decode, visible] = tile.task(task);
            const Bf16* const keys = cache_.keys(layer, head * g.num_kv_heads / g.num_heads);
            const std::int32_t* const blocks = cache_.blocks(segment.sequence, part.keys.start);
            PanelArgs args{.a = elements(qk) + (segment.first_row + row) * width + head * g.head_dim,
                           .a_stride = is_decode ? g.head_dim : width,
                           .panels = nullptr,
                           .panel_stride = g.head_dim * kPanelColumns,
                           .bias = nullptr,
                           .out = nullptr,
                           .out_stride = part.keys.columns,
                           .rows = rows,
                           .depth = g.head_dim,
                           .columns = 0};
            Bf16* const to = elements(out) + part.offset + (head * segment.rows + row) * part.keys.columns;
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
                args.out = to + panel * kPanelColumns;
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
            const PanelArgs args{
                .a = elements(probabilities) + part.offset + (head * segment.rows + row) * part.keys.columns,
                .a_stride = part.keys.columns,
                .panels = cache_.values(layer, head * g.num_kv_heads / g.num_heads) +
                          first_block * cache_.value_block_stride(),
                .panel_stride = cache_.value_panel_stride(),
                .bias = nullptr,
                .out = heads_.data() + (segment.first_row + row) * width + head * g.head_dim,
                .out_stride = is_decode ? g.head_dim : width,
                .rows = rows,
                .depth = depth,
                .columns = g.head_dim,
                .blocks = is_one_run ? nullptr : blocks,
                .block_stride = cache_.value_block_stride()};
            kernels_.product(args, 0, g.head_dim / kPanelColumns);
        }
    });
}

}  // namespace tsqp
