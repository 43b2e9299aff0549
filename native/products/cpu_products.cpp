#include "products/cpu_products.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "products/elements.h"

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

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
        std::byte* const to = element_of(hidden, row * width);
        if (hidden.dtype == Dtype::bf16)
            std::memcpy(to, from, width * sizeof(Bf16));
        else
            std::transform(from, from + width, reinterpret_cast<float*>(to), widened);
    }
}

void CpuProducts::apply(const PackedLinear& linear, const Rows& x, const Rows& out) const {
    require(is_floating(x.dtype) && is_floating(out.dtype) && x.rows == out.rows &&
                x.row_elements == linear.depth() && out.row_elements == linear.columns(),
            "the slots' rows do not fit the weight");
    linear.apply(kernels_, x.data, x.dtype == Dtype::f32, x.rows, out.data, out.dtype == Dtype::f32);
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
        kernels_, x.data, x.dtype == Dtype::f32, x.rows, new_values_.data() + first_row * width, false);
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

void CpuProducts::output(std::size_t layer, std::size_t first_row, const Rows& hidden) const {
    linear(layer, Linear::o, heads(first_row, hidden.rows, hidden.dtype), hidden);
}

}  // namespace tsqp
