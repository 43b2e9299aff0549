// The oracle: the products as they are written, with vectorisation off. Every other table must match its
// bits.

#include "field/field_impl.h"

namespace tsqp {
namespace {

void multiply(const MultiplyArgs& args) noexcept {
    for (std::size_t row = 0; row < args.rows; ++row) {
        const std::uint8_t* const digits = args.digits + row * args.stride;
        for (std::size_t c = 0; c < kPanelOutputs; ++c) {
            std::int32_t sum = 0;
            for (std::size_t k = 0; k < args.depth; ++k)
                sum += digits[k] * args.panel[(k / 4 * kPanelOutputs + c) * 4 + k % 4];
            args.sums[row * kPanelOutputs + c] = static_cast<std::uint32_t>(sum);
        }
    }
}

}  // namespace

constinit const FieldKernels kScalarField = field_kernels("scalar", multiply);

}  // namespace tsqp
