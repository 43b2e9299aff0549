// Who sees what of a tile, and where its numbers lie while it is computed.
#pragma once

#include "attention/attention.h"

namespace tsqp {
namespace {  // kernels of several instruction sets compile it: see kernels/lanes.h

// (m, s, o) of a tile's vectors after one block or several.
struct State {
    float* maxima;   // [kTileVectors]
    float* sums;     // [vectors, kLanes]
    float* outputs;  // [vectors, W]

    State(float* at, std::size_t vectors)
        : maxima(at), sums(at + kTileVectors), outputs(sums + vectors * kLanes) {}
};

// Key positions [begin, end) within a block, or vectors within a tile.
struct Range {
    std::size_t begin, end;
    bool operator==(const Range&) const = default;
};

// A tile, with what all its steps need.
template <class E>
struct TileWork {
    const AttendArgs& args;
    const QueryTile& tile;
    std::size_t ratio, dim, columns;
    float *kept, *added;  // [kTileVectors]: factors of a merge
    float* queries;       // [vectors, W]
    float* scores;        // [vectors, kCacheBlock]
    float* records;
    Range seen_by[kTileVectors];

    TileWork(const AttendArgs& given, const QueryTile& of, float* scratch)
        : args(given),
          tile(of),
          ratio(given.num_heads / given.cache.num_kv_heads),
          dim(given.cache.head_dim),
          columns(value_columns(dim)),
          kept(scratch),
          added(kept + kTileVectors),
          queries(added + kTileVectors),
          scores(queries + kTileVectors * columns),
          records(scores + kTileVectors * kCacheBlock) {
        for (std::size_t v = 0; v < tile.num_vectors; ++v) {
            const std::size_t end = args.position + row(v) + 1;
            seen_by[v] = {args.window != 0 && end > args.window ? end - args.window : 0, end};
        }
    }

    State record(float* at) const { return {at, tile.num_vectors}; }
    State scratch_record(std::size_t index) const {
        return record(records + index * record_elements(kTileVectors, dim));
    }
    std::size_t row(std::size_t vector) const { return (tile.first_vector + vector) / ratio; }
    std::size_t head(std::size_t vector) const {
        return tile.kv_head * ratio + (tile.first_vector + vector) % ratio;
    }
    // The positions that a vector sees.
    Range seen(std::size_t vector) const { return seen_by[vector]; }
    // Those of a block, counted from its first.
    Range seen(std::size_t vector, std::size_t block) const {
        const Range all = seen(vector);
        const std::size_t first = block * kCacheBlock;
        const auto within = [&](std::size_t position) {
            const std::size_t past = position > first ? position - first : 0;
            return past < kCacheBlock ? past : kCacheBlock;
        };
        return {within(all.begin), within(all.end)};
    }
    // The vectors that see a key of a block. Later rows begin and end later.
    Range seeing(std::size_t block) const {
        Range vectors{0, tile.num_vectors};
        const auto blind = [&](std::size_t vector) {
            const Range keys = seen(vector, block);
            return keys.begin >= keys.end;
        };
        while (vectors.begin < vectors.end && blind(vectors.begin)) ++vectors.begin;
        while (vectors.end > vectors.begin && blind(vectors.end - 1)) --vectors.end;
        return vectors;
    }
    const E* block(std::size_t index) const {
        const CachedSequence& cache = args.cache;
        const std::size_t place = static_cast<std::size_t>(cache.blocks[index]);
        return static_cast<const E*>(cache.elements) +
               (place * cache.num_kv_heads + tile.kv_head) * head_elements(cache.head_dim);
    }
};

}  // namespace
}  // namespace tsqp
