// One layer's keys and values of every sequence: private memory in blocks of 64 positions (attention.h).
//
// Which block of memory holds the positions [64 b, 64 b + 64) of a sequence is in a table. Pages are taken
// from the system as they are written to first, by large ones where the system has them: a block holds all kv
// heads, so a sequence fills them one behind the other. They are locked where that is asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "cpu/pages.h"

namespace tsqp {

class KeyValueCache {
  public:
    enum class Element { bf16, f32 };

    // table [sequences, blocks of each]: there are as many blocks as it has entries. Raises invalid_argument
    // where it names a block that is not there, or one twice, or where head_dim is no multiple of 4 or
    // nothing; bad_alloc where the address space is not that large.
    KeyValueCache(std::size_t num_kv_heads, std::size_t head_dim, std::size_t sequences,
                  std::vector<std::int32_t> table, Element element);

    // SAFETY: index < num_sequences().
    CachedSequence sequence(std::size_t index) const {
        return {pages_.data(), table_.data() + index * blocks_each_, num_kv_heads_, head_dim_};
    }
    // How many positions of a sequence there is room for.
    std::size_t capacity() const { return blocks_each_ * kCacheBlock; }
    std::size_t num_sequences() const { return sequences_; }
    std::size_t num_kv_heads() const { return num_kv_heads_; }
    std::size_t head_dim() const { return head_dim_; }
    Element element() const { return element_; }
    std::size_t num_bytes() const { return num_bytes_; }
    // As Pages::lock.
    int lock() const { return pages_.lock(); }
    // Bytes of one block, all kv heads.
    std::size_t block_bytes() const { return table_.empty() ? 0 : num_bytes() / table_.size(); }

    const ElementAttention& functions(const AttentionTable& table) const {
        return element_ == Element::bf16 ? table.bf16 : table.f32;
    }

  private:
    std::size_t num_kv_heads_, head_dim_, sequences_;
    std::vector<std::int32_t> table_;
    std::size_t blocks_each_;
    Element element_;
    std::size_t num_bytes_;
    Pages<std::byte> pages_;
};

}  // namespace tsqp
