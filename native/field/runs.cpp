#include "field/runs.h"

namespace tsqp {
namespace {

constexpr std::size_t kDigitBytes = 640 * 1024;
// Where rows are few a task is a run of panels: two for each thread, so that one that wakes late finds work,
// and more of a large Linear, so that all end together.
constexpr std::size_t kTaskBytes = 1024 * 1024, kTasksPerThread = 2;

}  // namespace

RunScratch& RunScratch::of_this_thread() {
    static thread_local RunScratch scratch;
    return scratch;
}

std::size_t blocks_of_a_run(std::size_t depth, std::size_t base) {
    return std::max<std::size_t>(1, kDigitBytes / (kBlockRows * base * depth));
}

void put_residues(const FieldKernels& kernels, const FieldWeights& weights, const RowSums& sums,
                  std::uint32_t* run) {
    ResidueArgs args{.digits = {},
                     .num_digits = sums.of_row.digits,
                     .column_sums = weights.column_sums() + sums.output,
                     .is_narrow = sums.of_row.is_narrow,
                     .out = run + sums.row * weights.outputs() + sums.output,
                     .columns = sums.columns};
    std::copy_n(sums.digits, kMaxDigits, args.digits);
    kernels.residue(args);
}

std::size_t tasks_of_a_run(const FieldWeights& weights, std::size_t num_blocks, std::size_t num_threads) {
    const std::size_t panels = weights.num_panels(), size_bytes = panels * weights.panel_bytes();
    // A panel with a block of many rows is work enough.
    if (num_blocks > 1) return panels * num_blocks;
    const std::size_t of_thread =
        std::max(kTasksPerThread, (size_bytes - 1) / (kTaskBytes * num_threads) + 1);
    return std::min(panels, of_thread * num_threads);
}

}  // namespace tsqp
