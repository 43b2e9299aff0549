#include "pads/direct_maker.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "field/runs.h"
#include "kernels/dispatch.h"

namespace tsqp {
namespace {

// Two blocks of digit rows: a panel that came from memory serves both, and a batch of a large Linear is still
// over in some hundredths of a second, which is how long the end of a maker's thread may take.
constexpr std::size_t kBatchRows = 2 * kBlockRows;

}  // namespace

DirectMaker::DirectMaker(std::shared_ptr<const PadKeys> keys, std::vector<const FieldWeights*> weights)
    : keys_(std::move(keys)), weights_(std::move(weights)) {
    if (keys_->num_linears() != weights_.size())
        throw std::invalid_argument("linears: got " + std::to_string(weights_.size()) + ", the keys are of " +
                                    std::to_string(keys_->num_linears()));
}

std::size_t DirectMaker::batch_rows() const { return kBatchRows; }

void DirectMaker::make(std::size_t linear, std::uint64_t first_row, std::size_t rows, std::uint32_t* products,
                       const Rest& rest) {
    const FieldWeights& weights = *weights_.at(linear);
    const FieldKernels& kernels = field_kernels_of(active_kernels().name);
    multiply_rows(
        kernels, weights, rows, kMaxDigits, 1,
        [&](std::size_t row, std::int32_t* integers) {
            // SAFETY: it throws in a forked child only, which has no maker; integers of one size are each
            // other's, with a sign or without.
            // NOTE(numerics): not centred, as four digits hold r too and sums below 2^54 are put together alike.
            keys_->draw(linear, first_row + row, weights.inputs(),
                        reinterpret_cast<std::uint32_t*>(integers));
            // Four, whatever was drawn: how long a row takes says nothing of it.
            return IntegerRow{.digits = kMaxDigits, .scale = 1.0f, .is_narrow = false};
        },
        [&](std::size_t first, const RowSums& sums) {
            // Once for all rows of a block with a panel.
            if (sums.row % kBlockRows == 0) rest.look();
            put_residues(kernels, weights, sums, products + first * weights.outputs());
        });
}

}  // namespace tsqp
