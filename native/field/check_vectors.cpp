#include "field/check_vectors.h"

#include <algorithm>
#include <vector>

#include "cpu/thread_pool.h"

namespace tsqp {
namespace {

// Inputs that a task sums over all outputs: a piece of a panel and its sums stay in the first-level cache.
constexpr std::size_t kTaskInputs = 256;
constexpr std::size_t kPairVectors = 2, kPairDigits = 2 * kPairVectors;

// A centred word as digits of 16 bits: low + 2^16 high.
struct Digits {
    std::int16_t low, high;
    explicit Digits(std::int32_t word)
        : low(static_cast<std::int16_t>(word)), high(static_cast<std::int16_t>((word - low) >> 16)) {}
};

// The digits of one vector or two: [panels, digit rows, 64], a vector's low ones before its high ones.
std::vector<std::int16_t> digits_of(const std::int32_t* vectors, std::size_t num_vectors, std::size_t size) {
    std::vector<std::int16_t> digits(2 * num_vectors * size);
    for (std::size_t v = 0; v < num_vectors; ++v)
        for (std::size_t i = 0; i < size; ++i) {
            const Digits word(vectors[v * size + i]);
            std::int16_t* const panel = digits.data() + i / kPanelOutputs * 2 * num_vectors * kPanelOutputs;
            panel[2 * v * kPanelOutputs + i % kPanelOutputs] = word.low;
            panel[(2 * v + 1) * kPanelOutputs + i % kPanelOutputs] = word.high;
        }
    return digits;
}

}  // namespace

void multiply_vectors(const CheckKernels& kernels, const FieldWeights& weights, const std::int32_t* vectors,
                      std::size_t num_vectors, std::int32_t* products) {
    const std::size_t panels = weights.num_panels(), depth = weights.depth(), size = panels * kPanelOutputs;
    std::vector<std::vector<std::int16_t>> pairs;
    for (std::size_t v = 0; v < num_vectors; v += kPairVectors)
        pairs.push_back(digits_of(vectors + v * size, std::min(kPairVectors, num_vectors - v), size));
    const std::size_t tasks = (depth - 1) / kTaskInputs + 1;
    parallel_rows(tasks, 1, get_num_threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        std::int32_t sums[kPairDigits * kTaskInputs * 2];
        for (std::size_t first = begin * kTaskInputs; first < std::min(depth, end * kTaskInputs);
             first += kTaskInputs) {
            const std::size_t inputs = std::min(kTaskInputs, depth - first);
            for (std::size_t v = 0; v < num_vectors; ++v)
                std::fill_n(products + v * depth + first, inputs, 0);
            for (std::size_t panel = 0; panel < panels; panel += kSummedPanels)
                for (std::size_t pair = 0; pair < pairs.size(); ++pair) {
                    const std::size_t of_pair = std::min(kPairVectors, num_vectors - pair * kPairVectors),
                                      digit_rows = 2 * of_pair;
                    std::fill_n(sums, digit_rows * inputs * 2, 0);
                    for (std::size_t of_run = panel; of_run < std::min(panels, panel + kSummedPanels);
                         ++of_run)
                        kernels.sum_panel({.panel = weights.panel(of_run) + first * kPanelOutputs,
                                           .inputs = inputs,
                                           .digits = pairs[pair].data() + of_run * digit_rows * kPanelOutputs,
                                           .digit_rows = digit_rows,
                                           .sums = sums});
                    for (std::size_t v = 0; v < of_pair; ++v)
                        for (std::size_t k = 0; k < inputs; ++k) {
                            const std::int32_t* const low = sums + (2 * v * inputs + k) * 2;
                            const std::int32_t* const high = low + inputs * 2;
                            std::int32_t& product = products[(pair * kPairVectors + v) * depth + first + k];
                            product = centred(residue(std::int64_t{product} + low[0] + low[1] +
                                                      (std::int64_t{high[0]} + high[1]) * 65536));
                        }
                }
        }
    });
}

}  // namespace tsqp
