#include "field/check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "border/words.h"
#include "cpu/pages.h"
#include "cpu/thread_pool.h"
#include "field/check_vectors.h"
#include "field/quantise.h"

namespace tsqp {
namespace {

// A run of a row's words that stays in the first-level cache between `take` and `dots`, with three others.
constexpr std::size_t kRunWords = 512;
// What is worth another thread.
constexpr std::size_t kTaskWords = 8192;

// Of a vector so many words are asked for ahead.
constexpr std::size_t kAskedWords = 2048;
// Of a row's pads while another row's begin is checked.
constexpr std::size_t kAskedPads = 1024;

constexpr std::size_t ceil_div(std::size_t size, std::size_t block) { return (size + block - 1) / block; }

// Asks for private memory that will be read soon: the processor's own look-ahead is too late for arrays as
// short as a row of most Linears.
template <class T>
void ask_for(const T* data, std::size_t size) {
    // gcc 12 takes a function that does nothing but ask for one without effect, and drops its calls.
    asm volatile("");
    for (std::size_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(data + i);
}

// What a calling thread keeps for its next check.
struct Scratch {
    Pages<std::int32_t> integers;        // [threads, kCheckRows, padded inputs]
    std::vector<std::int64_t> sums;      // [units, kCheckRows, vectors]
    std::vector<std::uint32_t> largest;  // [units]
};
thread_local Scratch scratch;

// A row that begins inside a word, after one of an odd width, begins with that word's upper half.
void read_row(std::uint32_t* to, const std::uint32_t* from, std::size_t size) {
    if (reinterpret_cast<std::uintptr_t>(from) % kWordBytes != 0 && size > 0) {
        // UNTRUSTED: of the word only this half is used, and of the words behind it what belongs to the row.
        std::uint32_t word[2];
        read_words(word, from - 1, sizeof word);
        *to++ = word[1];
        ++from, --size;
    }
    // UNTRUSTED: the only read; what follows works on the private copy.
    read_words(to, from, size * sizeof *to);
}

}  // namespace

FieldCheck::FieldCheck(const CheckKernels& kernels, const FieldWeights& weights, const std::uint32_t* vectors,
                       std::size_t num_vectors)
    : inputs_(weights.inputs()),
      outputs_(weights.outputs()),
      num_vectors_(num_vectors),
      padded_inputs_(weights.depth()),
      padded_outputs_(weights.num_panels() * kPanelOutputs),
      squares_limit_(squares_limit(weights.squares())),
      fingerprint_(weights.fingerprint()),
      scales_(weights.scales(), weights.scales() + padded_outputs_),
      vectors_(num_vectors * padded_outputs_),
      products_(num_vectors * padded_inputs_) {
    if (num_vectors == 0 || num_vectors > kMaxVectors)
        throw std::invalid_argument("vectors: got " + std::to_string(num_vectors) + ", expected 1 to " +
                                    std::to_string(kMaxVectors));
    if (weights.bias() != nullptr) bias_.assign(weights.bias(), weights.bias() + padded_outputs_);
    for (std::size_t v = 0; v < num_vectors; ++v)
        for (std::size_t i = 0; i < outputs_; ++i) {
            const std::uint32_t word = vectors[v * outputs_ + i];
            // The word is a secret: not in the message.
            if (word >= kPrime)
                throw std::invalid_argument("vectors[" + std::to_string(v) + ", " + std::to_string(i) +
                                            "]: expected less than 2^31 - 1");
            vectors_[v * padded_outputs_ + i] = centred(word);
        }
    multiply_vectors(kernels, weights, vectors_.data(), num_vectors, products_.data());
}

std::size_t FieldCheck::num_bytes() const {
    return (scales_.size() + bias_.size()) * sizeof(float) +
           (vectors_.size() + products_.size()) * sizeof(std::int32_t);
}

void FieldCheck::fetch() const {
    ask_for(products_.data(), products_.size());
    ask_for(scales_.data(), scales_.size());
    ask_for(bias_.data(), bias_.size());
    ask_for(vectors_.data(), vectors_.size());
}

void FieldCheck::begin(const FieldKernels& field, const CheckKernels& kernels, const float* x,
                       std::size_t rows, std::uint32_t* m, float* scales, std::uint32_t* sums,
                       std::uint32_t* copy, const PadsOfRows* pads) const {
    const std::size_t num_threads = get_num_threads(), group = kCheckRows * padded_inputs_;
    if (scratch.integers.size() < num_threads * group)
        scratch.integers = Pages<std::int32_t>(num_threads * group, true).withheld();
    std::int32_t* const all_integers = scratch.integers.data();
    if (rows <= kCheckRows)
        for (std::size_t v = 0; v < num_vectors_; ++v)
            ask_for(products_.data() + v * padded_inputs_, std::min(inputs_, kAskedWords));
    const auto begin_group = [&](std::int32_t* integers, std::size_t first) {
        const std::size_t count = std::min(kCheckRows, rows - first);
        for (std::size_t row = 0; row < count; ++row) {
            std::int32_t* const to = integers + row * padded_inputs_;
            const std::size_t at = (first + row) * inputs_;
            scales[first + row] = quantise_row(field, x + at, inputs_, squares_limit_, to).scale;
            std::fill(to + inputs_, to + padded_inputs_, 0);
            std::uint32_t* const copy_at = copy == nullptr ? nullptr : copy + at;
            if (pads != nullptr) {
                // SAFETY: it throws in a forked child only, where rows of pads cannot be spent.
                pads->keys.mask(pads->linear, pads->first_row + first + row, inputs_, to, m + at, copy_at);
                continue;
            }
            kernels.write_residues(to, inputs_, m + at);
            if (copy_at != nullptr)
                std::transform(to, to + inputs_, copy_at, [](std::int32_t integer) {
                    return static_cast<std::uint32_t>(integer) + (integer < 0 ? kPrime : 0);
                });
        }
        std::int64_t wide[kCheckRows * kMaxVectors] = {};
        kernels.dots({.rows = integers,
                      .row_stride = padded_inputs_,
                      .num_rows = count,
                      .vectors = products_.data(),
                      .vector_stride = padded_inputs_,
                      .num_vectors = num_vectors_,
                      .size = padded_inputs_,
                      .sums = wide});
        for (std::size_t i = 0; i < count * num_vectors_; ++i)
            sums[first * num_vectors_ + i] = residue(wide[i]);
    };
    parallel_rows(ceil_div(rows, kCheckRows), kTaskWords / (kCheckRows * inputs_) + 1, num_threads,
                  [&](std::size_t worker, std::size_t begin, std::size_t end) {
                      for (std::size_t index = begin; index < end; ++index)
                          begin_group(all_integers + worker * group, index * kCheckRows);
                  });
}

void FieldCheck::ask_for_run(std::size_t first, std::size_t end) const {
    if (first >= end) return;
    const std::size_t size = std::min(kRunWords, end - first);
    ask_for(scales_.data() + first, size);
    if (!bias_.empty()) ask_for(bias_.data() + first, size);
    for (std::size_t v = 0; v < num_vectors_; ++v)
        ask_for(vectors_.data() + v * padded_outputs_ + first, size);
}

void FieldCheck::ask_for_pads(const Rows& rows, std::size_t row, std::size_t begin, std::size_t first,
                              std::size_t end) {
    const std::uint32_t* const* const pads = rows.pads + row;
    const std::size_t next = first + kRunWords;
    if (next < end) ask_for(*pads + next, std::min(kRunWords, end - next));
    if (first == begin && pads + kCheckRows < rows.pads_end && pads[kCheckRows] != nullptr)
        ask_for(pads[kCheckRows] + begin, std::min(kAskedPads, end - begin));
}

// Some rows' words [begin, end). Returns the largest.
std::uint32_t FieldCheck::finish_words(const CheckKernels& kernels, const Rows& rows, std::size_t begin,
                                       std::size_t end, std::int64_t* sums) const {
    alignas(64) std::int32_t integers[kCheckRows * kRunWords];
    alignas(64) std::uint32_t words[kRunWords];
    std::uint32_t largest = 0;
    if (rows.are_few) ask_for_run(begin, end);
    for (std::size_t row = 0; rows.are_few && rows.pads != nullptr && row < rows.count; ++row)
        if (rows.pads[row] != nullptr) ask_for(rows.pads[row] + begin, std::min(kAskedPads, end - begin));
    for (std::size_t first = begin; first < end; first += kRunWords) {
        const std::size_t size = std::min(kRunWords, end - first);
        for (std::size_t row = 0; row < rows.count; ++row) {
            const std::size_t at = row * outputs_ + first;
            const std::uint32_t* from = rows.y + at;
            if (rows.copy != nullptr || reinterpret_cast<std::uintptr_t>(from) % kWordBytes != 0) {
                read_row(words, from, size);
                from = words;
                if (rows.copy != nullptr) std::copy_n(words, size, rows.copy + at);
            }
            const std::uint32_t* const pads = rows.pads == nullptr ? nullptr : rows.pads[row];
            if (pads != nullptr) ask_for_pads(rows, row, begin, first, end);
            largest = std::max(largest, kernels.take({.words = from,
                                                      .size = size,
                                                      .pads = pads == nullptr ? nullptr : pads + first,
                                                      .scales = scales_.data() + first,
                                                      .bias = bias_.empty() ? nullptr : bias_.data() + first,
                                                      .scale = rows.scales[row],
                                                      .integers = integers + row * kRunWords,
                                                      .out = rows.out + at}));
        }
        if (rows.are_few) ask_for_run(first + kRunWords, end);
        kernels.dots({.rows = integers,
                      .row_stride = kRunWords,
                      .num_rows = rows.count,
                      .vectors = vectors_.data() + first,
                      .vector_stride = padded_outputs_,
                      .num_vectors = num_vectors_,
                      .size = padded_to_step(size),
                      .sums = sums});
    }
    return largest;
}

bool FieldCheck::finish(const CheckKernels& kernels, const std::uint32_t* y, std::size_t rows,
                        const float* scales, const std::uint32_t* sums, float* out, std::uint32_t* copy,
                        const std::uint32_t* const* pads) const {
    const std::size_t num_threads = get_num_threads(), groups = ceil_div(rows, kCheckRows);
    // Few rows are cut into pieces, of whole runs.
    std::size_t pieces = 1;
    if (num_threads > 1 && groups < 2 * num_threads)
        pieces = std::min(ceil_div(outputs_, kTaskWords),
                          ceil_div(3 * num_threads, std::max<std::size_t>(1, groups)));
    const std::size_t piece_words = ceil_div(ceil_div(outputs_, pieces), kRunWords) * kRunWords;
    pieces = ceil_div(outputs_, piece_words);
    const std::size_t units = groups * pieces, of_unit = kCheckRows * num_vectors_;
    scratch.sums.assign(units * of_unit, 0);
    std::int64_t* const wide = scratch.sums.data();
    scratch.largest.assign(units, 0);
    std::uint32_t* const largest = scratch.largest.data();
    parallel_rows(units, kTaskWords / (kCheckRows * piece_words) + 1, num_threads,
                  [&](std::size_t, std::size_t begin, std::size_t end) {
                      for (std::size_t unit = begin; unit < end; ++unit) {
                          const std::size_t first = unit / pieces * kCheckRows,
                                            from = unit % pieces * piece_words;
                          largest[unit] = finish_words(
                              kernels,
                              {.count = std::min(kCheckRows, rows - first),
                               .are_few = rows <= kCheckRows,
                               .y = y + first * outputs_,
                               .scales = scales + first,
                               .out = out + first * outputs_,
                               .copy = copy == nullptr ? nullptr : copy + first * outputs_,
                               .pads = pads == nullptr ? nullptr : pads + first,
                               .pads_end = pads == nullptr ? nullptr : pads + rows},
                              from, std::min(outputs_, from + piece_words), wide + unit * of_unit);
                      }
                  });
    bool holds = units == 0 || *std::max_element(largest, largest + units) < kPrime;
    for (std::size_t i = 0; i < rows * num_vectors_; ++i) {
        const std::size_t group = i / of_unit;
        std::int64_t sum = 0;
        for (std::size_t piece = 0; piece < pieces; ++piece)
            sum += wide[(group * pieces + piece) * of_unit + i % of_unit];
        holds = residue(sum) == sums[i] && holds;
    }
    return holds;
}

}  // namespace tsqp
