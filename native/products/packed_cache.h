// The keys and values of every sequence, packed as the products read them (panels.h), in blocks of 64 keys.
//
// Of one kv head in one layer, block p is
//
//     keys      two panels of 32 keys over all of D: B = K^T       at p * 64 * D
//     values    D / 32 panels of 32 columns over 64 keys: B = V    panel q at (q * blocks + p) * 64 * 32
//
// Which block holds the keys [64 b, 64 b + 64) of a sequence is in a table (tsqp_shm/gpu/kv_cache.py). Where
// blocks of the table follow on each other, so do their panels, and the products take them as one. That is
// why a block's values are in D / 32 places: in one, no two blocks would make one longer panel, and a row of
// decode over 8,192 keys of D = 128 took 1.4 times as long.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/pages.h"
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
    // Block 0 of a kv head, and how far it is to the next, and from one panel of values to the next.
    const std::uint16_t* keys(std::size_t layer, std::size_t group) const {
        return keys_.data() + offset(layer, group);
    }
    const std::uint16_t* values(std::size_t layer, std::size_t group) const {
        return values_.data() + offset(layer, group);
    }
    std::size_t key_block_stride() const { return kKeyBlock * head_dim_; }
    std::size_t value_block_stride() const { return kKeyBlock * kPanelColumns; }
    std::size_t value_panel_stride() const { return table_.size() * value_block_stride(); }

  private:
    std::size_t offset(std::size_t layer, std::size_t group) const {
        return (layer * groups_ + group) * table_.size() * key_block_stride();
    }
    std::size_t block(std::size_t sequence, std::size_t position) const {
        return static_cast<std::size_t>(*blocks(sequence, position));
    }

    std::size_t layers_, groups_, head_dim_, sequences_;
    std::vector<std::int32_t> table_;
    std::size_t blocks_each_;
    Pages<std::uint16_t> keys_, values_;  // [layers, G, blocks * 64 * D]
};

}  // namespace tsqp
