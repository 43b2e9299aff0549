#include "products/packed_linear.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/pages.h"
#include "cpu/stacked_pages.h"
#include "cpu/thread_pool.h"

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

// What one thread takes at a time: enough to be worth a ticket, little enough that two threads end together.
// Rows of a Linear whose activations stay in the second-level cache while the panels go over them; bytes of
// weights where rows are few.
constexpr std::size_t kRowBlock = 128, kPanelBytes = 128 * 1024;
// Depth times panels of a task with many rows: some 20 us; more where threads have enough tasks for all that,
// up to what leaves room for the rows in the second-level cache.
constexpr std::size_t kBlockDepth = 4608, kTasksPerThread = 16, kPanelBlockBytes = 1024 * 1024;
// Rows of more inputs than kWholeDepth lie so far apart that they push each other out of that cache: they are
// taken kDepthCut inputs at a time, of more rows and panels, with sums in between.
constexpr std::size_t kWholeDepth = 4096, kDepthCut = 288, kCutRowBlock = 256, kCutPanels = 16;
constexpr std::size_t kFewRows = 32;

std::size_t ceil_div(std::size_t size, std::size_t block) { return (size + block - 1) / block; }

// Kept by each thread of the pool, as pages that are new each time would cost more than the sums.
float* this_threads_sums() {
    static_assert(sizeof(float) == 2 * sizeof(Bf16));
    thread_local const Pages<Bf16> pages(2 * sums_elements(kCutRowBlock, kCutPanels), false);
    return reinterpret_cast<float*>(pages.data());
}

}  // namespace

PackedLinear::PackedLinear(const Bf16* weight, std::size_t columns, std::size_t depth, const Bf16* bias)
    : columns_(columns), depth_(depth) {
    if (depth % kDepthBlock != 0)
        throw std::invalid_argument("a packed Linear takes whole blocks of 32 inputs");
    memory_ = stacked_pages(num_panels(columns) * kPanelColumns * depth * sizeof(Bf16));
    auto* const panels = reinterpret_cast<Bf16*>(memory_.get());
    pack_panels(weight, columns, depth, panels);
    panels_ = panels;
    if (bias != nullptr) bias_.assign(bias, bias + columns);
}

void PackedLinear::apply(const PanelKernels& kernels, const void* x, bool x_is_f32, std::size_t rows,
                         void* out, bool out_is_f32) const {
    const std::size_t x_bytes = x_is_f32 ? sizeof(float) : sizeof(Bf16);
    const std::size_t out_row_bytes = columns_ * (out_is_f32 ? sizeof(float) : sizeof(Bf16));
    const std::size_t panels = num_panels(columns_), panel_stride = depth_ * kPanelColumns;
    const bool few = rows <= kFewRows,
               is_cut = !few && !x_is_f32 && kernels.cuts_depth && depth_ > kWholeDepth;
    const std::size_t row_block = few ? rows : is_cut ? kCutRowBlock : kRowBlock;
    const bool is_short = rows == 1 && panels * panel_stride * sizeof(Bf16) < kShortProductBytes;
    const std::size_t threads = is_short ? num_threads_beside_another() : get_num_threads();
    const std::size_t row_blocks = ceil_div(rows, row_block);
    const std::size_t even = panels * row_blocks / (kTasksPerThread * threads);
    const std::size_t largest = is_cut ? kCutPanels : kPanelBlockBytes / (panel_stride * sizeof(Bf16));
    const std::size_t panel_block =
        std::max<std::size_t>(1, few ? kPanelBytes / (panel_stride * sizeof(Bf16))
                                     : std::min(largest, std::max(kBlockDepth / depth_, even)));
    const std::size_t depth_block = is_cut ? kDepthCut : depth_;
    parallel_rows(row_blocks * ceil_div(panels, panel_block), 1, threads,
                  [&](std::size_t, std::size_t begin, std::size_t end) {
                      float* const sums = is_cut ? this_threads_sums() : nullptr;
                      for (std::size_t task = begin; task < end; ++task) {
                          // A block of panels stays in the second-level cache while all rows go over it.
                          const std::size_t panel = task / row_blocks * panel_block,
                                            row = task % row_blocks * row_block;
                          for (std::size_t k = 0; k < depth_; k += depth_block) {
                              const PanelArgs args{
                                  .a = static_cast<const std::byte*>(x) + (row * depth_ + k) * x_bytes,
                                  .a_stride = depth_,
                                  .panels = panels_ + k * kPanelColumns,
                                  .panel_stride = panel_stride,
                                  .bias = bias_.empty() ? nullptr : bias_.data(),
                                  .out = static_cast<std::byte*>(out) + row * out_row_bytes,
                                  .out_stride = columns_,
                                  .rows = std::min(row_block, rows - row),
                                  .depth = std::min(depth_block, depth_ - k),
                                  .columns = columns_,
                                  .sums = sums,
                                  .is_first = k == 0,
                                  .is_last = k + depth_block >= depth_,
                                  .a_is_f32 = x_is_f32,
                                  .out_is_f32 = out_is_f32};
                              kernels.product(args, panel, std::min(panel + panel_block, panels));
                          }
                      }
                  });
}

}  // namespace tsqp
