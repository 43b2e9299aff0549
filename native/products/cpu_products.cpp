#include "products/cpu_products.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/thread_pool.h"
#include "products/terms.h"

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
const float* float32s(const Rows& rows) { return reinterpret_cast<const float*>(rows.data); }
std::byte* at(const Rows& rows, std::size_t element) {
    return rows.data + element * element_bytes(rows.dtype);
}

// Rows that one thread splits at a time.
constexpr std::size_t kSplitRows = 8;

// A thread's operands for the products of attention in two terms, kept from task to task.
struct TermOperands {
    std::vector<Bf16> rows;
    std::vector<std::int32_t> blocks;
};

TermOperands& this_threads_operands() {
    thread_local TermOperands operands;
    return operands;
}

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
    float32_heads_ = Pages<float>(g.max_tokens * g.num_heads * g.head_dim, false);
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
    require(tokens.dtype == Dtype::i32 && tokens.row_elements == 1 && is_floating(hidden.dtype) &&
                hidden.row_elements == geometry_.hidden && tokens.rows == hidden.rows &&
                embedding_ != nullptr,
            "embed takes token ids and gives hidden rows");
    const std::size_t width = geometry_.hidden;
    for (std::size_t row = 0; row < tokens.rows; ++row) {
        std::int32_t token;
        std::memcpy(&token, tokens.data + row * sizeof token, sizeof token);
        if (token < 0 || static_cast<std::size_t>(token) >= geometry_.vocabulary)
            throw std::out_of_range("token " + std::to_string(token) + " is not in the vocabulary");
        const Bf16* const from = embedding_ + static_cast<std::size_t>(token) * width;
        std::byte* const to = at(hidden, row * width);
        if (hidden.dtype == Dtype::bf16)
            std::memcpy(to, from, width * sizeof(Bf16));
        else
            widen(from, width, reinterpret_cast<float*>(to));
    }
}

CpuProducts::Input CpuProducts::input(const Rows& x) {
    if (x.dtype == Dtype::bf16) return {elements(x), false};
    require(x.dtype == Dtype::f32 && x.row_elements % kTermBlock == 0,
            "the rows are of another dtype or width");
    const std::size_t width = x.row_elements;
    terms_.resize(std::max(terms_.size(), 2 * x.rows * width));
    parallel_rows(x.rows, kSplitRows, get_num_threads(),
                  [&](std::size_t, std::size_t begin, std::size_t end) {
                      split_into_terms(float32s(x) + begin * width, (end - begin) * width,
                                       terms_.data() + 2 * begin * width);
                  });
    return {terms_.data(), true};
}

void CpuProducts::apply(const PackedLinear& linear, const Rows& x, const Rows& out) {
    require(is_floating(x.dtype) && is_floating(out.dtype) && x.rows == out.rows &&
                x.row_elements == linear.depth() && out.row_elements == linear.columns(),
            "the slots' rows do not fit the weight");
    const auto [rows, is_in_terms] = input(x);
    linear.apply(kernels_, rows, is_in_terms, x.rows, out.data, out.dtype == Dtype::f32);
}

void CpuProducts::linear(std::size_t layer, Linear which, const Rows& x, const Rows& out) {
    apply(layers_.at(layer).linears[static_cast<std::size_t>(which)], x, out);
}

void CpuProducts::lm_head(const Rows& x, const Rows& out) { apply(lm_head_, x, out); }

void CpuProducts::qkv(std::size_t layer, std::size_t first_row, const Rows& x, const Rows& qk) {
    const auto& linears = layers_.at(layer).linears;
    const PackedLinear &of_qk = linears[static_cast<std::size_t>(Linear::qk)],
                       &of_v = linears[static_cast<std::size_t>(Linear::v)];
    require(is_floating(x.dtype) && is_floating(qk.dtype) && x.rows == qk.rows &&
                x.row_elements == of_qk.depth() && qk.row_elements == of_qk.columns(),
            "the slots' rows do not fit the weight");
    const std::size_t width = geometry_.num_kv_heads * geometry_.head_dim;
    require(first_row <= geometry_.max_tokens && x.rows <= geometry_.max_tokens - first_row,
            "rows outside the batch");
    const auto [rows, is_in_terms] = input(x);
    of_qk.apply(kernels_, rows, is_in_terms, x.rows, qk.data, qk.dtype == Dtype::f32);
    of_v.apply(kernels_, rows, is_in_terms, x.rows, new_values_.data() + first_row * width, false);
}

Rows CpuProducts::heads(std::size_t first_row, std::size_t rows, Dtype dtype) const {
    const std::size_t width = geometry_.num_heads * geometry_.head_dim;
    require(first_row <= geometry_.max_tokens && rows <= geometry_.max_tokens - first_row,
            "rows outside the batch");
    auto* const data = dtype == Dtype::f32
                           ? reinterpret_cast<std::byte*>(float32_heads_.data() + first_row * width)
                           : reinterpret_cast<std::byte*>(heads_.data() + first_row * width);
    return {data, rows, width, dtype};
}

void CpuProducts::output(std::size_t layer, std::size_t first_row, const Rows& hidden) {
    linear(layer, Linear::o, heads(first_row, hidden.rows, hidden.dtype), hidden);
}

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
    std::vector<Bf16> rounded(qk.dtype == Dtype::f32 ? kv_width : 0);
    for (std::size_t row = 0; row < segment.rows; ++row) {
        const std::size_t batch_row = segment.first_row + row,
                          element = batch_row * width + g.num_heads * g.head_dim;
        const Bf16* keys = elements(qk) + element;
        if (qk.dtype == Dtype::f32) {
            round_to_bf16(float32s(qk) + element, kv_width, rounded.data());
            keys = rounded.data();
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
    const std::vector<std::int32_t> depth_blocks = blocks_of_terms(g.head_dim);
    parallel_rows(tile.num_tasks, 1, tile.threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        for (std::size_t task = begin; task < end; ++task) {
            const auto& [part, segment, piece, head, row, rows, is_decode, visible] = tile.task(task);
            const Bf16* const keys = cache_.keys(layer, head * g.num_kv_heads / g.num_heads);
            const std::int32_t* const blocks = cache_.blocks(segment.sequence, part.keys.start);
            const std::size_t query = (segment.first_row + row) * width + head * g.head_dim;
            const std::size_t query_stride = is_decode ? g.head_dim : width;
            PanelArgs args{.a = elements(qk) + query,
                           .a_stride = query_stride,
                           .panels = nullptr,
                           .panel_stride = g.head_dim * kPanelColumns,
                           .bias = nullptr,
                           .out = nullptr,
                           .out_stride = part.keys.columns,
                           .rows = rows,
                           .depth = g.head_dim,
                           .columns = 0,
                           .block_stride = kTermBlockStride,
                           .block_bits = kTermBlockBits,
                           .out_is_f32 = out.dtype == Dtype::f32};
            if (qk.dtype == Dtype::f32) {
                std::vector<Bf16>& terms = this_threads_operands().rows;
                terms.resize(2 * rows * g.head_dim);
                for (std::size_t r = 0; r < rows; ++r)
                    split_into_terms(float32s(qk) + query + r * query_stride, g.head_dim,
                                     terms.data() + 2 * r * g.head_dim);
                args.a = terms.data();
                args.a_stride = args.depth = 2 * g.head_dim;
                args.blocks = depth_blocks.data();
            }
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
                args.out = at(out, to + panel * kPanelColumns);
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
    const bool is_in_terms = probabilities.dtype == Dtype::f32;
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
            PanelArgs args{.a = elements(probabilities) + from,
                           .a_stride = part.keys.columns,
                           .panels = cache_.values(layer, head * g.num_kv_heads / g.num_heads) +
                                     first_block * cache_.value_block_stride(),
                           .panel_stride = cache_.value_panel_stride(),
                           .bias = nullptr,
                           .out = at(to, (segment.first_row + row) * width + head * g.head_dim),
                           .out_stride = is_decode ? g.head_dim : width,
                           .rows = rows,
                           .depth = depth,
                           .columns = g.head_dim,
                           .blocks = is_one_run ? nullptr : blocks,
                           .block_stride = cache_.value_block_stride(),
                           .out_is_f32 = is_in_terms};
            if (!is_in_terms) {
                kernels_.product(args, 0, g.head_dim / kPanelColumns);
                continue;
            }
            TermOperands& operands = this_threads_operands();
            operands.blocks.clear();
            for (std::size_t k = 0; k < depth; k += kTermBlock) {
                const std::size_t key_block =
                    is_one_run ? k / kKeyBlock : static_cast<std::size_t>(blocks[k / kKeyBlock]);
                const std::size_t block = key_block * (kKeyBlock / kTermBlock) + k % kKeyBlock / kTermBlock;
                operands.blocks.insert(operands.blocks.end(), 2, static_cast<std::int32_t>(block));
            }
            operands.rows.resize(2 * kSplitRows * depth);
            args.a = operands.rows.data();
            args.a_stride = args.depth = 2 * depth;
            args.blocks = operands.blocks.data();
            args.block_stride = kTermBlockStride;
            args.block_bits = kTermBlockBits;
            // A few rows at a time: of a long sequence they are long.
            for (std::size_t r = 0; r < rows; r += kSplitRows) {
                args.rows = std::min(kSplitRows, rows - r);
                for (std::size_t i = 0; i < args.rows; ++i)
                    split_into_terms(float32s(probabilities) + from + (r + i) * part.keys.columns, depth,
                                     operands.rows.data() + 2 * i * depth);
                args.out =
                    at(to, (segment.first_row + row) * width + head * g.head_dim + r * args.out_stride);
                kernels_.product(args, 0, g.head_dim / kPanelColumns);
            }
        }
    });
}

}  // namespace tsqp
