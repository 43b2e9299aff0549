#include "attention/attend.h"

#include <algorithm>
#include <atomic>
#include <string_view>
#include <vector>

#include "cpu/thread_pool.h"
#include "kernels/dispatch.h"
#include "kernels/scratch.h"

namespace tsqp {
namespace {

// Rows that are appended at a time.
constexpr std::size_t kAppendRows = 16;
// Where there are few tiles, their blocks are split into ranges, about so many for each thread, none shorter
// than so many blocks. More than so many floats of records are not kept: then a tile is done at once.
constexpr std::size_t kTilesPerThread = 8, kRangesPerThread = 12, kLeastBlocks = 2;
constexpr std::size_t kMostRecordElements = std::size_t{8} << 20;

struct AppendItem {
    std::size_t segment, begin, end;
};

struct Tile {
    std::size_t segment;
    QueryTile queries;
    std::size_t records;     // where the first of its blocks' records lies; none where it is one item
    std::uint32_t unmerged;  // its items that are not done
};

struct AttendItem {
    std::size_t tile, begin, end;  // blocks
};

// What a step is cut into; kept by the calling thread, so that a step allocates nothing once the largest was
// seen.
struct Plan {
    std::vector<AttendArgs> segments;
    std::vector<AppendItem> appends;
    std::vector<Tile> tiles;
    std::vector<AttendItem> items;
    std::vector<float> records;
};

void plan_appends(Plan& plan, std::span<const Segment> segments) {
    plan.appends.clear();
    for (std::size_t i = 0; i < segments.size(); ++i)
        for (std::size_t row = 0; row < segments[i].rows; row += kAppendRows)
            plan.appends.push_back({i, row, std::min(segments[i].rows, row + kAppendRows)});
}

// Long tiles first: what is left for the last thread is short.
void plan_tiles(Plan& plan, std::span<const Segment> segments) {
    plan.tiles.clear();
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const AttendArgs& args = plan.segments[i];
        const std::size_t ratio = args.num_heads / args.cache.num_kv_heads,
                          vectors = segments[i].rows * ratio;
        const std::size_t count = (vectors + kTileVectors - 1) / kTileVectors;
        for (std::size_t number = count; number-- > 0;) {
            const std::size_t first = number * kTileVectors, size = std::min(kTileVectors, vectors - first);
            const std::size_t first_end = args.position + first / ratio + 1;
            const std::size_t last_end = args.position + (first + size - 1) / ratio + 1;
            const std::size_t seen =
                args.window != 0 && first_end > args.window ? first_end - args.window : 0;
            for (std::size_t g = 0; g < args.cache.num_kv_heads; ++g)
                plan.tiles.push_back(
                    {i, {g, first, size, seen / kCacheBlock, (last_end - 1) / kCacheBlock + 1}, 0, 0});
        }
    }
}

void plan_items(Plan& plan, std::size_t num_threads) {
    plan.items.clear();
    std::size_t blocks = 0, elements = 0;
    for (const Tile& tile : plan.tiles) blocks += tile.queries.end_block - tile.queries.first_block;
    const bool few = num_threads > 1 && plan.tiles.size() < kTilesPerThread * num_threads;
    const std::size_t range = few ? std::max(kLeastBlocks, blocks / (num_threads * kRangesPerThread))
                                  : std::max<std::size_t>(blocks, 1);
    for (std::size_t i = 0; i < plan.tiles.size(); ++i) {
        Tile& tile = plan.tiles[i];
        const std::size_t first = tile.queries.first_block, end = tile.queries.end_block;
        const std::size_t needed =
            (end - first) *
            record_elements(tile.queries.num_vectors, plan.segments[tile.segment].cache.head_dim);
        const bool split = end - first > range && needed <= kMostRecordElements - elements;
        const std::size_t pieces = split ? (end - first + range - 1) / range : 1;
        const std::size_t step = (end - first + pieces - 1) / pieces;  // of about the same length
        tile.records = elements;
        if (split) elements += needed;
        for (std::size_t block = first; block < end; block += step, ++tile.unmerged)
            plan.items.push_back({i, block, std::min(end, block + step)});
    }
    if (plan.records.size() < elements) plan.records.resize(elements);
}

}  // namespace

const AttentionTable& active_attention() {
    const std::string_view name = active_kernels().name;
#if defined(__x86_64__)
    if (name == kAvx2Attention.name) return kAvx2Attention;
    if (name != kScalarAttention.name) return kAvx512Attention;
#endif
    return kScalarAttention;
}

void attend(const AttentionTable& table, const KeyValueCache& cache, const AttendStep& step,
            std::span<const Segment> segments) {
    static thread_local Plan plan_of_thread;
    Plan& plan = plan_of_thread;
    const ElementAttention& functions = cache.functions(table);
    const std::size_t num_threads = get_num_threads(), head_dim = cache.head_dim();
    const std::size_t row_elements = (step.num_heads + 2 * cache.num_kv_heads()) * head_dim;
    plan.segments.clear();
    for (const Segment& segment : segments)
        plan.segments.push_back(
            {cache.sequence(segment.sequence), step.qkv + segment.first_row * row_elements,
             step.out + segment.first_row * step.num_heads * head_dim, row_elements, step.num_heads,
             segment.position, step.scale, step.soft_cap, step.window, step.sinks});
    plan_appends(plan, segments);
    plan_tiles(plan, segments);
    plan_items(plan, num_threads);
    const Scratch scratch(num_threads, scratch_elements(head_dim));
    parallel_rows(
        plan.appends.size(), 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i) {
                const AppendItem& item = plan.appends[i];
                const AttendArgs& args = plan.segments[item.segment];
                functions.append({args.cache, args.qkv, args.row_elements, args.num_heads, args.position},
                                 scratch.of(worker), item.begin, item.end);
            }
        });
    parallel_rows(
        plan.items.size(), 1, num_threads, [&](std::size_t worker, std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i) {
                const AttendItem& item = plan.items[i];
                Tile& tile = plan.tiles[item.tile];
                const AttendArgs& args = plan.segments[tile.segment];
                const QueryTile& queries = tile.queries;
                if (item.begin == queries.first_block && item.end == queries.end_block) {
                    functions.attend(args, queries, scratch.of(worker));
                    continue;
                }
                float* const records = plan.records.data() + tile.records;
                functions.attend_blocks(args, queries, item.begin, item.end, records, scratch.of(worker));
                // SYNC POINT: acquire and release; who takes the last one sees the records of all who were
                // before.
                if (std::atomic_ref(tile.unmerged).fetch_sub(1, std::memory_order_acq_rel) == 1)
                    functions.merge(args, queries, records, scratch.of(worker));
            }
        });
}

std::uint64_t read_blocks(const KeyValueCache& cache, std::size_t sequence, std::size_t positions) {
    const CachedSequence cached = cache.sequence(sequence);
    const std::size_t blocks = (std::min(positions, cache.capacity()) + kCacheBlock - 1) / kCacheBlock;
    const std::size_t words = cache.block_bytes() / sizeof(std::uint64_t), num_threads = get_num_threads();
    std::atomic<std::uint64_t> total{0};
    const std::size_t range = std::max<std::size_t>(1, blocks / (num_threads * kRangesPerThread));
    parallel_rows(blocks, range, num_threads, [&](std::size_t, std::size_t begin, std::size_t end) {
        // A line at a time, and asking for lines in time: without it a core reads at half the speed.
        constexpr std::size_t kSums = 64 / sizeof(std::uint64_t), kAhead = 2048 / sizeof(std::uint64_t);
        std::uint64_t sums[kSums] = {};
        for (std::size_t block = begin; block < end; ++block) {
            const auto* from = static_cast<const std::uint64_t*>(cached.elements) +
                               static_cast<std::size_t>(cached.blocks[block]) * words;
            for (std::size_t i = 0; i < words; i += kSums) {
                __builtin_prefetch(from + std::min(i + kAhead, words - 1));
                for (std::size_t j = 0; j < kSums; ++j) sums[j] += from[i + j];
            }
        }
        std::uint64_t sum = 0;
        for (const std::uint64_t each : sums) sum += each;
        total.fetch_add(sum, std::memory_order_relaxed);
    });
    return total;
}

}  // namespace tsqp
