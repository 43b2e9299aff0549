// Attention of every instruction set against the scalar one, bit for bit, between unreadable pages; and a
// whole step on several threads against rows one by one.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "attention/attend.h"
#include "check.h"
#include "cpu/thread_pool.h"
#include "guarded.h"
#include "kernels/dispatch.h"

using namespace tsqp;

namespace {

std::mt19937 random_bits(11);

void fill(Guarded<float>& to) {
    std::normal_distribution<float> normal(0.0f, 1.5f);
    for (float& x : to) x = normal(random_bits);
}

bool same_bits(Guarded<float>& a, Guarded<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Shape {
    std::size_t num_heads, num_kv_heads, head_dim;
    std::size_t row_elements() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// A sequence in a cache whose only blocks lie between unreadable pages, in reversed order.
template <class E>
struct GuardedCache {
    explicit GuardedCache(const Shape& shape, std::size_t positions)
        : num_blocks((positions + kCacheBlock - 1) / kCacheBlock),
          blocks(num_blocks),
          elements(num_blocks * shape.num_kv_heads * kCacheBlock *
                   (shape.head_dim + value_columns(shape.head_dim))),
          cached{elements.data(), blocks.data(), shape.num_kv_heads, shape.head_dim} {
        for (std::size_t i = 0; i < num_blocks; ++i)
            blocks[i] = static_cast<std::int32_t>(num_blocks - 1 - i);
        // What was there before is no number.
        std::fill(elements.begin(), elements.end(), static_cast<E>(sizeof(E) == 2 ? 0x7FC0 : 0));
        if constexpr (sizeof(E) == 4)
            std::fill(elements.begin(), elements.end(), std::numeric_limits<float>::quiet_NaN());
    }
    std::size_t num_blocks;
    Guarded<std::int32_t> blocks;
    Guarded<E> elements;
    CachedSequence cached;
};

template <class E>
const ElementAttention& functions(const AttentionTable& table) {
    return sizeof(E) == 2 ? table.bf16 : table.f32;
}

struct Options {
    float soft_cap;
    std::size_t window;
    bool sinks;
};

// All rows from position 0 as tiles of the largest size, whole or block by block.
template <class E>
void attend_all(const AttentionTable& table, const Shape& shape, const Options& options, Guarded<float>& qkv,
                Guarded<float>& out, bool by_blocks) {
    const std::size_t rows = qkv.size() / shape.row_elements(), ratio = shape.num_heads / shape.num_kv_heads;
    GuardedCache<E> cache(shape, rows);
    Guarded<float> scratch(scratch_elements(shape.head_dim)), sinks(shape.num_heads);
    for (std::size_t h = 0; h < sinks.size(); ++h) sinks[h] = static_cast<float>(h) - 1;
    const ElementAttention& use = functions<E>(table);
    use.append({cache.cached, qkv.data(), shape.row_elements(), shape.num_heads, 0}, scratch.data(), 0, rows);
    const AttendArgs args{cache.cached,
                          qkv.data(),
                          out.data(),
                          shape.row_elements(),
                          shape.num_heads,
                          0,
                          0.3f,
                          options.soft_cap,
                          options.window,
                          options.sinks ? sinks.data() : nullptr};
    for (std::size_t g = 0; g < shape.num_kv_heads; ++g)
        for (std::size_t first = 0; first < rows * ratio; first += kTileVectors) {
            const std::size_t size = std::min(kTileVectors, rows * ratio - first);
            const std::size_t first_end = first / ratio + 1, last_end = (first + size - 1) / ratio + 1;
            const std::size_t seen =
                options.window != 0 && first_end > options.window ? first_end - options.window : 0;
            const QueryTile tile{g, first, size, seen / kCacheBlock, (last_end - 1) / kCacheBlock + 1};
            if (!by_blocks) {
                use.attend(args, tile, scratch.data());
                continue;
            }
            const std::size_t blocks = tile.end_block - tile.first_block;
            Guarded<float> records(blocks * record_elements(size, shape.head_dim));
            for (std::size_t block = tile.end_block; block-- > tile.first_block;)
                use.attend_blocks(args, tile, block, block + 1, records.data(), scratch.data());
            use.merge(args, tile, records.data(), scratch.data());
        }
}

template <class E>
void test_tables(const std::vector<const AttentionTable*>& tables) {
    for (const Shape& shape :
         {Shape{1, 1, 4}, Shape{6, 2, 20}, Shape{3, 1, 64}, Shape{5, 1, 100}, Shape{2, 2, 256}})
        for (const std::size_t rows : {1, 17, 65, 131})
            for (const Options& options :
                 {Options{0, 0, false}, Options{0, 30, true}, Options{2, 64, false}}) {
                Guarded<float> qkv(rows * shape.row_elements()),
                    expected(rows * shape.num_heads * shape.head_dim);
                Guarded<float> found(expected.size());
                fill(qkv);
                attend_all<E>(kScalarAttention, shape, options, qkv, expected, false);
                CHECK(
                    std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }));
                for (const AttentionTable* table : tables) {
                    attend_all<E>(*table, shape, options, qkv, found, true);
                    CHECK(same_bits(found, expected));
                    if (table == &kScalarAttention) continue;
                    attend_all<E>(*table, shape, options, qkv, found, false);
                    CHECK(same_bits(found, expected));
                }
            }
}

// A cache rounds as kernels.h says, to nearest even; the rest of a block stays as it was.
void test_append_rounds(const AttentionTable& table) {
    const Shape shape{1, 1, 4};
    GuardedCache<std::uint16_t> cache(shape, 65);
    const std::vector<std::uint16_t> before(cache.elements.begin(), cache.elements.end());
    Guarded<float> qkv(shape.row_elements()), scratch(scratch_elements(shape.head_dim));
    const std::uint32_t bits[] = {0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001,
                                  0x00000001, 0x80008001, 0x7F7FFFFF, 0xFF800000};
    const std::uint16_t rounded[] = {0x3F80, 0x3F82, 0x3F81, 0x7FC0, 0x0000, 0x8001, 0x7F80, 0xFF80};
    for (std::size_t i = 0; i < 8; ++i) qkv[4 + i] = std::bit_cast<float>(bits[i]);
    // Position 65 - 1 is the first of the second block, which lies first in memory.
    table.bf16.append({cache.cached, qkv.data(), shape.row_elements(), 1, 64}, scratch.data(), 0, 1);
    for (std::size_t d = 0; d < 4; ++d) {
        CHECK(cache.elements[d / 2 * kCacheBlock * 2 + d % 2] == rounded[d]);
        CHECK(cache.elements[4 * kCacheBlock + d * 2] == rounded[4 + d]);
    }
    std::size_t changed = 0;
    for (std::size_t i = 0; i < before.size(); ++i) changed += before[i] != cache.elements[i];
    CHECK(changed == 7);  // one of them is the NaN that was there
}

void test_step_on_threads() {
    const Shape shape{6, 2, 64};
    const std::size_t blocks = 12;
    std::vector<std::int32_t> table(3 * blocks);
    for (std::size_t i = 0; i < table.size(); ++i)
        table[i] = static_cast<std::int32_t>((i * 5) % table.size());
    const AttentionTable& kernels = active_attention();
    const auto run = [&](std::size_t threads, bool rows_alone, Guarded<float>& qkv, Guarded<float>& out) {
        set_num_threads(threads);
        const KeyValueCache cache(2, 64, 3, table, KeyValueCache::Element::bf16);
        const AttendStep step{qkv.data(), out.data(), 6, 0.125f, 0, 0, nullptr};
        const std::vector<Segment> segments{
            {0, 0, 0, 300}, {2, 0, 300, 700}, {1, 0, 1000, 1}, {0, 300, 1001, 23}};
        if (!rows_alone) return attend(kernels, cache, step, segments);
        for (const Segment& segment : segments)
            for (std::size_t row = 0; row < segment.rows; ++row) {
                const Segment one{segment.sequence, segment.position + row, segment.first_row + row, 1};
                attend(kernels, cache, step, {&one, 1});
            }
    };
    Guarded<float> qkv(1024 * shape.row_elements()), expected(1024 * 6 * 64), found(expected.size());
    fill(qkv);
    run(1, true, qkv, expected);
    for (const std::size_t threads : {1, 2, 4}) {
        run(threads, false, qkv, found);
        CHECK(same_bits(found, expected));
    }
    run(4, true, qkv, found);  // a row is split by its blocks
    CHECK(same_bits(found, expected));
    set_num_threads(1);
}

void test_a_cache_refuses_what_it_cannot_be() {
    const auto refused = [](std::size_t groups, std::size_t dim, std::size_t sequences,
                            std::vector<std::int32_t> table) {
        try {
            const KeyValueCache cache(groups, dim, sequences, std::move(table), KeyValueCache::Element::bf16);
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    CHECK(!refused(1, 4, 2, {1, 0}));
    CHECK(refused(0, 4, 2, {1, 0}) && refused(1, 0, 2, {1, 0}) && refused(1, 6, 2, {1, 0}));
    CHECK(refused(1, 4, 0, {}) && refused(1, 4, 2, {}) && refused(1, 4, 2, {0, 1, 2}));
    CHECK(refused(1, 4, 1, {0, 2}) && refused(1, 4, 1, {0, -1}) && refused(1, 4, 1, {1, 1}));
}

}  // namespace

int main() {
    std::vector<const AttentionTable*> tables{&kScalarAttention};
    for (const KernelTable* table : supported_kernels()) {
        use_kernels(table->name);
        if (&active_attention() != tables.back()) tables.push_back(&active_attention());
    }
    for (const AttentionTable* table : tables) {
        std::printf("attention: %s\n", table->name);
        test_append_rounds(*table);
    }
    test_tables<std::uint16_t>(tables);
    test_tables<float>(tables);
    test_step_on_threads();
    test_a_cache_refuses_what_it_cannot_be();
}
