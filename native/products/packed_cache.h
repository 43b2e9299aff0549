// The keys and values of every sequence, packed as the products read them (panels.h), in blocks of 64 keys.
//
// A block of one kv head in one layer is one run of 64 * D elements, keys and values apart:
//
//     keys      two panels, each of 32 keys over all of D: B = K^T
//     values    D / 32 panels, each of 32 columns of D over the block's 64 keys: B = V, its depth in blocks
//
// Which block holds the keys [64 b, 64 b + 64) of a sequence is in a table (tsqp_shm/gpu/kv_cache.py). Where
// blocks of the table follow on each other, so do they in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "products/pages.h"
#include "products/panels.h"

namespace tsqp {

class PackedCache {
  public:
    // table [sequences, blocks of each]. There are as many blocks as the table has entries. Raises
    // invalid_argument where it names one that is not there, or head_dim is not whole panels.
    PackedCache(std::size_t layers, std::size_t groups, std::size_t head_dim, std::size_t sequences,
                std::vector<std::int32_t> table);

    // Writes a key and a value [D] bf16 of one kv head.
    void append(std::size_t layer, std::size_t group, std::size_t sequence, std::size_t position,
                const std::uint16_t* key, const std::uint16_t* value) const;
    // Clears the values [begin, end) of a sequence in every layer. Raises invalid_argument unless they are in
    // the cache and end with a pair of keys.
    void clear_values(std::size_t sequence, std::size_t begin, std::size_t end) const;

    // The sequence's blocks from the one that `position` begins.
    const std::int32_t* blocks(std::size_t sequence, std::size_t position) const {
        return table_.data() + sequence * blocks_each_ + position / kKeyBlock;
    }
    // Block 0 of a kv head; the next block is block_elements() further.
    const std::uint16_t* keys(std::size_t layer, std::size_t group) const {
        return keys_.data() + offset(layer, group, 0);
    }
    const std::uint16_t* values(std::size_t layer, std::size_t group) const {
        return values_.data() + offset(layer, group, 0);
    }
    std::size_t block_elements() const { return kKeyBlock * head_dim_; }

  private:
    std::size_t offset(std::size_t layer, std::size_t group, std::size_t block) const {
        return ((layer * groups_ + group) * table_.size() + block) * block_elements();
    }
    std::size_t offset_of(std::size_t layer, std::size_t group, std::size_t sequence,
                          std::size_t position) const {
        return offset(layer, group, static_cast<std::size_t>(*blocks(sequence, position)));
    }

    std::size_t layers_, groups_, head_dim_, sequences_;
    std::vector<std::int32_t> table_;
    std::size_t blocks_each_;
    Pages keys_, values_;  // [layers, G, blocks, 64 * D]
};

}  // namespace tsqp
