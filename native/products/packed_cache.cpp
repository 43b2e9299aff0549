#include "products/packed_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tsqp {

using Bf16 = std::uint16_t;

PackedCache::PackedCache(std::size_t layers, std::size_t groups, std::size_t head_dim, std::size_t sequences,
                         std::vector<std::int32_t> table)
    : layers_(layers),
      groups_(groups),
      head_dim_(head_dim),
      sequences_(sequences),
      table_(std::move(table)),
      blocks_each_(sequences == 0 ? 0 : table_.size() / sequences),
      keys_(layers * groups * table_.size() * kKeyBlock * head_dim, false),
      values_(layers * groups * table_.size() * kKeyBlock * head_dim, false) {
    const auto is_there = [&](std::int32_t block) {
        return block >= 0 && static_cast<std::size_t>(block) < table_.size();
    };
    if (head_dim % kPanelColumns != 0 || blocks_each_ * sequences != table_.size() ||
        !std::all_of(table_.begin(), table_.end(), is_there))
        throw std::invalid_argument("a cache takes heads of whole panels, and a table of blocks that it has");
}

void PackedCache::append(std::size_t layer, std::size_t group, std::size_t sequence, std::size_t position,
                         const Bf16* key, const Bf16* value) const {
    const std::size_t in_block = block(sequence, position), within = position % kKeyBlock;
    Bf16* to = keys_.data() + offset(layer, group) + in_block * key_block_stride() +
               within / kPanelColumns * kPanelColumns * head_dim_ + within % kPanelColumns * 2;
    for (std::size_t d = 0; d < head_dim_; d += 2)
        std::memcpy(to + d * kPanelColumns, key + d, 2 * sizeof(Bf16));
    to = values_.data() + offset(layer, group) + in_block * value_block_stride() +
         within / 2 * kPanelColumns * 2 + within % 2;
    for (std::size_t d = 0; d < head_dim_; ++d)
        to[d / kPanelColumns * value_panel_stride() + d % kPanelColumns * 2] = value[d];
}

void PackedCache::clear_values(std::size_t sequence, std::size_t begin, std::size_t end) const {
    if (sequence >= sequences_ || begin > end || end > blocks_each_ * kKeyBlock || end % 2 != 0)
        throw std::invalid_argument("no such keys in the cache");
    for (std::size_t key = begin; key < end;) {
        const std::size_t next = std::min(end, (key / kKeyBlock + 1) * kKeyBlock);
        const std::size_t from = key % kKeyBlock, to = from + (next - key);
        for (std::size_t layer = 0; layer < layers_; ++layer)
            for (std::size_t group = 0; group < groups_; ++group)
                for (std::size_t q = 0; q < head_dim_ / kPanelColumns; ++q) {
                    Bf16* const panel = values_.data() + offset(layer, group) + q * value_panel_stride() +
                                        block(sequence, key) * value_block_stride();
                    const std::size_t even = from + from % 2;
                    // The second of a pair of keys lies between values that stay.
                    if (even > from)
                        for (std::size_t d = 0; d < kPanelColumns; ++d)
                            panel[(from / 2 * kPanelColumns + d) * 2 + 1] = 0;
                    std::memset(panel + even * kPanelColumns, 0, (to - even) * kPanelColumns * sizeof(Bf16));
                }
        key = next;
    }
}

}  // namespace tsqp
