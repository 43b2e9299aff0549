// Attention (attention.h) over a type `L` of 16 f32 lanes (kernels/lanes.h); each attention_<isa>.cpp brings
// its own `L`. As there, everything is in an anonymous namespace, and nothing of std is called.
#pragma once

#include "attention/attention.h"
#include "attention/panel_product.h"
#include "attention/tile_work.h"
#include "kernels/lanes.h"

namespace tsqp {
namespace {

template <class L, class E>
struct Attention {
    using V = typename L::V;
    using Product = PanelProduct<L, E>;
    using Work = TileWork<E>;

    static void load_queries(const Work& work) {
        for (std::size_t v = 0; v < work.tile.num_vectors; ++v) {
            const float* from =
                work.args.qkv + work.row(v) * work.args.row_elements + work.head(v) * work.dim;
            for_each_block(work.dim, [&](std::size_t i, auto part) {
                L::store(work.queries + v * work.columns + i, L::read(from + i, part), part);
            });
        }
    }

    // Products to soft_cap * tanh(scale * product / soft_cap). Apart: it is as long as all the rest.
    [[gnu::noinline]] static void cap_softly(float* scores, float scale, float soft_cap) {
        const V cap = L::set(soft_cap), factor = L::set(scale);
        for (std::size_t i = 0; i < kCacheBlock; i += kLanes) {
            const V x = L::div(L::mul(L::load(scores + i, Full{}), factor), cap);
            L::store(scores + i, L::mul(cap, hyperbolic_tangent<L>(x)), Full{});
        }
    }

    // scale * score to exp(scale * score - largest), 0 where a key is not seen, with their largest and the
    // sums of the lanes.
    template <bool kAllSeen>
    [[gnu::always_inline]] static void exponentials(float* scores, Range keys, float scale, float* maximum,
                                                    float* sums) {
        const V factor = L::set(scale), none = L::set(-__builtin_inff());
        constexpr std::size_t kBlocks = kCacheBlock / kLanes;
        V y[kBlocks];
        V maxima = none;
        unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) {
            V x = L::mul(L::load(scores + j.value * kLanes, Full{}), factor);
            if constexpr (!kAllSeen) {
                constexpr std::size_t first = decltype(j)::value * kLanes;
                const auto within = [](std::size_t key) {
                    const std::size_t past = key > first ? key - first : 0;
                    return past < kLanes ? past : kLanes;
                };
                x = L::select(x, none, Between{within(keys.begin), within(keys.end)});
            }
            y[j.value] = x;
            maxima = L::max(x, maxima);  // passes over a NaN
        });
        *maximum = L::largest(maxima);
        const V highest = L::set(*maximum);
        V total = L::set(0.0f);
        unrolled<kBlocks>([&](auto j) __attribute__((always_inline)) {
            const V e = exp_nonpositive<L, float>(L::sub(y[j.value], highest));
            L::store(scores + j.value * kLanes, e, Full{});
            total = L::add(total, e);
        });
        L::store(sums, total, Full{});
    }

    // The values of up to kProductRows vectors from `first` on. What one of them does not see is not touched:
    // it may be a NaN, which no factor makes 0.
    static void weigh_values(const Work& work, std::size_t block, const Matrix<E>& values, std::size_t first,
                             std::size_t count, float* outputs) {
        const std::size_t columns = work.columns;
        const auto weigh = [&](std::size_t v, std::size_t rows, Range keys, bool add) {
            Product::multiply(rows, work.scores + v * kCacheBlock, kCacheBlock, values, keys.begin, keys.end,
                              outputs + v * columns, columns, add);
        };
        // Later vectors begin and end later.
        const Range earliest = work.seen(first, block), latest = work.seen(first + count - 1, block);
        const Range common{latest.begin, earliest.end};
        if (earliest == latest || common.begin >= common.end) {
            const std::size_t together = earliest == latest ? count : 1;
            for (std::size_t v = first; v < first + count; v += together)
                weigh(v, together, work.seen(v, block), false);
            return;
        }
        for (std::size_t v = first; v < first + count; ++v)
            weigh(v, 1, {work.seen(v, block).begin, common.begin}, false);
        weigh(first, count, common, true);
        for (std::size_t v = first; v < first + count; ++v)
            if (const Range keys = work.seen(v, block); keys.end > common.end)
                weigh(v, 1, {common.end, keys.end}, true);
    }

    // One block of the vectors that see a key of it.
    static void attend_block(const Work& work, std::size_t block, Range vectors, const State& to) {
        const E* keys = work.block(block);
        const E* next = block + 1 < work.tile.end_block ? work.block(block + 1) : keys;
        const auto ahead = static_cast<std::ptrdiff_t>(reinterpret_cast<std::uintptr_t>(next) -
                                                       reinterpret_cast<std::uintptr_t>(keys));
        // Scores of keys that are not there yet are made and not used.
        Product::multiply(vectors.end - vectors.begin, work.queries + vectors.begin * work.columns,
                          work.columns, {keys, kCacheBlock, ahead}, 0, work.dim,
                          work.scores + vectors.begin * kCacheBlock, kCacheBlock, false);
        const bool capped = work.args.soft_cap != 0.0f;
        const float scale = capped ? 1.0f : work.args.scale;
        for (std::size_t v = vectors.begin; v < vectors.end; ++v) {
            float* const scores = work.scores + v * kCacheBlock;
            if (capped) cap_softly(scores, work.args.scale, work.args.soft_cap);
            const Range seen = work.seen(v, block);
            if (seen == Range{0, kCacheBlock})
                exponentials<true>(scores, seen, scale, to.maxima + v, to.sums + v * kLanes);
            else
                exponentials<false>(scores, seen, scale, to.maxima + v, to.sums + v * kLanes);
        }
        const Matrix<E> values{keys + work.dim * kCacheBlock, work.columns, ahead};
        for (std::size_t v = vectors.begin; v < vectors.end; v += L::kProductRows) {
            const std::size_t left = vectors.end - v;
            weigh_values(work, block, values, v, left < L::kProductRows ? left : L::kProductRows, to.outputs);
        }
    }

    static void copy(const float* from, float* to, std::size_t size) {
        for (std::size_t i = 0; i < size; i += kLanes) L::store(to + i, L::load(from + i, Full{}), Full{});
    }

    // Takes a block's record into the state.
    static void take(const Work& work, std::size_t block, Range vectors, const State& from,
                     const State& state) {
        for (std::size_t v = vectors.begin / kLanes * kLanes; v < vectors.end; v += kLanes) {
            const V before = L::load(state.maxima + v, Full{}), found = L::load(from.maxima + v, Full{});
            const V factor = exp_nonpositive<L, float>(L::negative_abs(L::sub(before, found)));
            const V one = L::set(1.0f);
            L::store(work.kept + v, L::select_less(before, found, factor, one), Full{});
            L::store(work.added + v, L::select_less(before, found, one, factor), Full{});
        }
        const auto merge = [](float* state_at, const float* from_at, V kept, V added) {
            const V now = L::mul(L::load(from_at, Full{}), added);
            L::store(state_at, L::fma(L::load(state_at, Full{}), kept, now), Full{});
        };
        const std::size_t columns = work.columns;
        for (std::size_t v = vectors.begin; v < vectors.end; ++v) {
            const bool first = work.args.sinks == nullptr && work.seen(v).begin / kCacheBlock == block;
            if (first) {
                state.maxima[v] = from.maxima[v];
                copy(from.sums + v * kLanes, state.sums + v * kLanes, kLanes);
                copy(from.outputs + v * columns, state.outputs + v * columns, columns);
                continue;
            }
            const V kept = L::set(work.kept[v]), added = L::set(work.added[v]);
            merge(state.sums + v * kLanes, from.sums + v * kLanes, kept, added);
            for (std::size_t i = v * columns; i < (v + 1) * columns; i += kLanes)
                merge(state.outputs + i, from.outputs + i, kept, added);
            if (state.maxima[v] < from.maxima[v]) state.maxima[v] = from.maxima[v];
        }
    }

    // The state before the first block.
    static void begin(const Work& work, const State& state, const State& other) {
        for (std::size_t i = 0; i < kTileVectors; ++i) state.maxima[i] = other.maxima[i] = 0.0f;
        if (work.args.sinks == nullptr) return;
        const V zero = L::set(0.0f);
        for (std::size_t v = 0; v < work.tile.num_vectors; ++v) {
            state.maxima[v] = work.args.sinks[work.head(v)];
            L::store(state.sums + v * kLanes, zero, Full{});
            state.sums[v * kLanes] = 1.0f;
            for (std::size_t i = 0; i < work.columns; i += kLanes)
                L::store(state.outputs + v * work.columns + i, zero, Full{});
        }
    }

    static void finish(const Work& work, const State& state) {
        for (std::size_t v = 0; v < work.tile.num_vectors; ++v) {
            const V total = L::set(sum_lanes<L>(L::load(state.sums + v * kLanes, Full{})));
            float* out = work.args.out + (work.row(v) * work.args.num_heads + work.head(v)) * work.dim;
            for_each_block(work.dim, [&](std::size_t i, auto part) {
                L::write(out + i, L::div(L::load(state.outputs + v * work.columns + i, part), total), part);
            });
        }
    }

    static void attend(const AttendArgs& args, const QueryTile& tile, float* scratch) noexcept {
        const Work work(args, tile, scratch);
        const State state = work.scratch_record(0), found = work.scratch_record(1);
        load_queries(work);
        begin(work, state, found);
        for (std::size_t block = tile.first_block; block < tile.end_block; ++block) {
            const Range vectors = work.seeing(block);
            attend_block(work, block, vectors, found);
            take(work, block, vectors, found, state);
        }
        finish(work, state);
    }

    static void attend_blocks(const AttendArgs& args, const QueryTile& tile, std::size_t begin_block,
                              std::size_t end_block, float* records, float* scratch) noexcept {
        const Work work(args, tile, scratch);
        load_queries(work);
        const std::size_t stride = record_elements(tile.num_vectors, work.dim);
        for (std::size_t block = begin_block; block < end_block; ++block)
            attend_block(work, block, work.seeing(block),
                         work.record(records + (block - tile.first_block) * stride));
    }

    static void merge(const AttendArgs& args, const QueryTile& tile, const float* records,
                      float* scratch) noexcept {
        const Work work(args, tile, scratch);
        const State state = work.scratch_record(0);
        begin(work, state, work.scratch_record(1));
        const std::size_t stride = record_elements(tile.num_vectors, work.dim);
        for (std::size_t block = tile.first_block; block < tile.end_block; ++block, records += stride)
            take(work, block, work.seeing(block), work.record(const_cast<float*>(records)), state);
        finish(work, state);
    }

    // Element `column` of row `row` of a matrix of the cache.
    static std::size_t at(std::size_t row, std::size_t column, std::size_t columns) {
        if constexpr (sizeof(E) == sizeof(Bf16))
            return (row / 2 * columns + column) * 2 + row % 2;
        else
            return row * columns + column;
    }

    static void append(const AppendArgs& args, float* scratch, std::size_t begin, std::size_t end) noexcept {
        const CachedSequence& cache = args.cache;
        const std::size_t dim = cache.head_dim, columns = value_columns(dim), groups = cache.num_kv_heads;
        E* const rounded = reinterpret_cast<E*>(scratch);
        const auto round = [&](const float* from) {
            for_each_block(dim, [&](std::size_t i, auto part) {
                L::write(rounded + i, L::read(from + i, part), Full{});
            });
        };
        for (std::size_t i = begin; i < end; ++i) {
            const std::size_t position = args.position + i, key = position % kCacheBlock;
            const std::size_t place = static_cast<std::size_t>(cache.blocks[position / kCacheBlock]);
            const float* k = args.qkv + i * args.row_elements + args.num_heads * dim;
            E* to = static_cast<E*>(cache.elements) + place * groups * head_elements(cache.head_dim);
            // Each element of a key lies in a line of its own: all are asked for at once.
            for (std::size_t g = 0; g < groups; ++g)
                for (std::size_t d = 0; d < dim; d += 2)
                    __builtin_prefetch(to + g * head_elements(dim) + at(d, key, kCacheBlock), 1);
            for (std::size_t g = 0; g < groups; ++g, to += head_elements(cache.head_dim)) {
                round(k + g * dim);
                for (std::size_t d = 0; d < dim; ++d) to[at(d, key, kCacheBlock)] = rounded[d];
                E* const values = to + dim * kCacheBlock;
                round(k + (groups + g) * dim);
                for (std::size_t d = 0; d < dim; ++d) values[at(key, d, columns)] = rounded[d];
            }
        }
    }

    static constexpr ElementAttention functions() { return {append, attend, attend_blocks, merge}; }
};

template <class L>
void hyperbolic_tangents(const TanhArgs& args, std::size_t begin, std::size_t end) noexcept {
    for_each_block(end - begin, [&](std::size_t i, auto part) {
        L::store(args.to + begin + i, hyperbolic_tangent<L>(L::load(args.from + begin + i, part)), part);
    });
}

template <class L>
constexpr AttentionTable attention_table(const char* name) {
    return {name, Attention<L, Bf16>::functions(), Attention<L, float>::functions(), hyperbolic_tangents<L>};
}

}  // namespace
}  // namespace tsqp
