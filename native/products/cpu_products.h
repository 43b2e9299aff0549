// The GPU process's operations where its device is the CPU: Linears and attention over slots, on packed
// weights and a packed KV cache (panels.h). What a record may ask for was checked before; here every slot and
// row is bounds-checked.
//
// Slots of activations are bf16 or f32, each as its record says. Rows in f32 are multiplied as they are, and what
// is made of them is rounded no further; keys and values are bf16 in the cache.
//
// Shapes: T tokens, C hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary, R rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "border/slots.h"
#include "cpu/pages.h"
#include "products/packed_cache.h"
#include "products/packed_linear.h"
#include "products/panels.h"

namespace tsqp {

struct CpuGeometry {
    std::size_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocabulary;
    std::size_t max_tokens, max_sequences, max_keys;  // max_keys: whole blocks of 64
};

class CpuProducts {
  public:
    enum class Linear { qk, v, o, gate_up, down };

    struct Segment {
        std::size_t sequence, position, first_row, rows;
    };
    // The keys [start, start + columns) of the cache that a segment is scored against: whole blocks of 64.
    struct KeyRange {
        std::size_t start, columns;
    };

    // blocks [max_sequences, max_keys / 64]: where the cache's blocks lie (packed_cache.h). Raises
    // invalid_argument where a width is not whole depth blocks, the table does not fit, or the instruction
    // set is not this machine's or has no kernels for products.
    CpuProducts(const CpuGeometry& geometry, std::vector<std::int32_t> blocks,
                std::string_view instruction_set);

    // Raises invalid_argument unless weight [N, K] has the shape of that Linear.
    void set_linear(std::size_t layer, Linear which, PackedLinear linear);
    // embedding [V, C], row-major, must outlive this object. Raises invalid_argument for another shape.
    void set_embedding(const std::uint16_t* embedding, std::size_t rows, std::size_t columns);
    void set_lm_head(PackedLinear linear);

    // Clears the cached values [begin, end) of a sequence in every layer: zero probabilities times what
    // another sequence left there must be zero.
    void clear_values(std::size_t sequence, std::size_t begin, std::size_t end) {
        cache_.clear_values(sequence, begin, end);
    }
    // The step's segments, and for each of the model's window sizes the keys that each segment sees. Raises
    // invalid_argument where one lies outside the cache or the batch.
    void begin_step(std::vector<Segment> segments, std::vector<std::vector<KeyRange>> keys);

    // tokens [T, 1] i32  ->  hidden [T, C]. Raises out_of_range for a token outside the vocabulary.
    void embed(const Rows& tokens, const Rows& hidden) const;
    // x [T, C]  ->  qk [T, (H+G)*D]; v stays here.
    void qkv(std::size_t layer, std::size_t first_row, const Rows& x, const Rows& qk);
    // qk (all rows of its slot)  ->  scores: one dense [H, rows, columns] block a segment, only what a row
    // may see and what shares a block with it; appends k and v to the cache first.
    void scores(std::size_t layer, std::size_t window, std::size_t first_segment, std::size_t num_segments,
                const Rows& qk, const Rows& scores);
    // Probabilities in the same blocks, 0 where a row may not see  ->  heads, kept here.
    void context(std::size_t layer, std::size_t window, std::size_t first_segment, std::size_t num_segments,
                 const Rows& probabilities);
    // heads of rows [first_row, +), which context made of probabilities in hidden's dtype  ->  hidden [T, C].
    void output(std::size_t layer, std::size_t first_row, const Rows& hidden) const;
    // x  ->  out through the layer's Linear.
    void linear(std::size_t layer, Linear which, const Rows& x, const Rows& out) const;
    void lm_head(const Rows& x, const Rows& out) const;

  private:
    struct Layer {
        PackedLinear linears[5];
    };
    struct Tile;

    Tile tile(std::size_t window, std::size_t first_segment, std::size_t num_segments,
              const Rows& slot) const;
    void append(std::size_t layer, const Segment& segment, const Rows& qk) const;
    void apply(const PackedLinear& linear, const Rows& x, const Rows& out) const;
    Rows heads(std::size_t first_row, std::size_t rows, Dtype dtype) const;

    const CpuGeometry geometry_;
    const PanelKernels& kernels_;
    std::vector<Layer> layers_;
    PackedLinear lm_head_;
    const std::uint16_t* embedding_ = nullptr;
    PackedCache cache_;
    Pages<std::uint16_t> new_values_, heads_;  // [T, G*D], [T, H*D]
    Pages<float> float32_heads_;               // [T, H*D]; as many rows are touched as ever come in f32
    std::vector<Segment> segments_;
    std::vector<std::vector<KeyRange>> seen_;
};

}  // namespace tsqp
