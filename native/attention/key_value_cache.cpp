#include "attention/key_value_cache.h"

#include <algorithm>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

namespace tsqp {
namespace {

std::size_t product(std::initializer_list<std::size_t> factors) {
    std::size_t result = 1;
    for (const std::size_t factor : factors)
        if (__builtin_mul_overflow(result, factor, &result)) throw std::bad_alloc();
    return result;
}

std::size_t checked_bytes(std::size_t num_kv_heads, std::size_t head_dim, std::size_t sequences,
                          const std::vector<std::int32_t>& table, std::size_t element_bytes) {
    constexpr std::size_t kLargestHead = 1 << 20;
    if (num_kv_heads == 0) throw std::invalid_argument("num_kv_heads: got 0, expected 1 or more");
    if (head_dim == 0 || head_dim % 4 != 0 || head_dim > kLargestHead)
        throw std::invalid_argument("head_dim: got " + std::to_string(head_dim) +
                                    ", expected a multiple of 4");
    if (sequences == 0 || table.empty() || table.size() % sequences != 0)
        throw std::invalid_argument("blocks: expected a block or more for each sequence");
    std::vector<bool> taken(table.size());
    for (const std::int32_t block : table) {
        const auto place = static_cast<std::size_t>(block);
        if (block < 0 || place >= table.size())
            throw std::invalid_argument("blocks: got " + std::to_string(block) + ", expected 0 to " +
                                        std::to_string(table.size()) + " exclusive");
        if (taken[place]) throw std::invalid_argument("blocks: " + std::to_string(block) + " is there twice");
        taken[place] = true;
    }
    return product(
        {table.size(), num_kv_heads, kCacheBlock, head_dim + value_columns(head_dim), element_bytes});
}

// The system lays a mapping where a large page begins only if it ends where one ends; on small pages a core
// reads at three quarters of its speed.
std::size_t whole_pages(std::size_t size_bytes) {
    constexpr std::size_t kLargePage = std::size_t{2} << 20;
    const bool worth_it = size_bytes >= kLargePage / 2 && size_bytes <= SIZE_MAX - kLargePage;
    return worth_it ? (size_bytes + kLargePage - 1) / kLargePage * kLargePage : size_bytes;
}

}  // namespace

KeyValueCache::KeyValueCache(std::size_t num_kv_heads, std::size_t head_dim, std::size_t sequences,
                             std::vector<std::int32_t> table, Element element)
    : num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      sequences_(sequences),
      table_(std::move(table)),
      blocks_each_(sequences == 0 ? 0 : table_.size() / sequences),
      element_(element),
      num_bytes_(checked_bytes(num_kv_heads, head_dim, sequences, table_, element == Element::bf16 ? 2 : 4)),
      pages_(whole_pages(num_bytes_), true) {}

}  // namespace tsqp
