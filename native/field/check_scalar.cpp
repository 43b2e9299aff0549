// The oracle of check_kernels.h: as it is written, one element at a time.

#include "border/words.h"
#include "field/check_kernels.h"

namespace tsqp {
namespace {

void write_residues(const std::int32_t* integers, std::size_t size, std::uint32_t* to) noexcept {
    for (std::size_t i = 0; i < size; i += 2) {
        const std::uint32_t pair[] = {residue(integers[i]), residue(integers[i + 1])};
        write_words(to + i, pair, sizeof pair);
    }
}

std::uint32_t take(const TakeArgs& args) noexcept {
    std::uint32_t largest = 0;
    for (std::size_t i = 0; i < args.size; i += 2) {
        const std::size_t count = args.size - i < 2 ? 1 : 2;
        std::uint32_t pair[2];
        // UNTRUSTED: the only read of these words; what follows works on the private copy.
        read_words(pair, args.words + i, count * sizeof *pair);
        for (std::size_t j = 0; j < count; ++j) {
            largest = pair[j] > largest ? pair[j] : largest;
            const std::int32_t integer = centred(pair[j]);
            args.integers[i + j] = integer;
            const std::int32_t product =
                args.pads == nullptr ? integer : centred(reduced(pair[j] + args.pads[i + j]));
            float result = static_cast<float>(product) * (args.scales[i + j] / args.scale);
            if (args.bias != nullptr) result = result + args.bias[i + j];
            args.out[i + j] = result != result ? __builtin_bit_cast(float, 0x7FC00000) : result;
        }
    }
    for (std::size_t i = args.size; i < padded_to_step(args.size); ++i) args.integers[i] = 0;
    return largest;
}

void dots(const DotsArgs& args) noexcept {
    for (std::size_t row = 0; row < args.num_rows; ++row)
        for (std::size_t vector = 0; vector < args.num_vectors; ++vector) {
            std::int64_t sum = 0;
            for (std::size_t i = 0; i < args.size; ++i)
                // Words of 2^31 and more, which no check passes, leave integers that are not centred.
                sum = (sum + std::int64_t{args.rows[row * args.row_stride + i]} *
                                 args.vectors[vector * args.vector_stride + i]) %
                      kPrime;
            args.sums[row * args.num_vectors + vector] += sum;
        }
}

void sum_panel(const SumPanelArgs& args) noexcept {
    for (std::size_t d = 0; d < args.digit_rows; ++d)
        for (std::size_t k = 0; k < args.inputs; ++k)
            for (std::size_t c = 0; c < kPanelOutputs; ++c)
                args.sums[(d * args.inputs + k) * 2 + c / 2 % 2] +=
                    args.digits[d * kPanelOutputs + c] * args.panel[(k / 4 * kPanelOutputs + c) * 4 + k % 4];
}

}  // namespace

constinit const CheckKernels kScalarCheck{"scalar", write_residues, take, dots, sum_panel};

}  // namespace tsqp
