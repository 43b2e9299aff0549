// The check of a Linear that another process multiplied, by Freivalds: with a secret vector s and Ws = W^T s,
// <y, s> == <m, Ws> mod p holds for y = m W, and for any other y in [0, p) in one of p choices of s.
//
// Every row is checked, with every vector. What is checked and what results are made of are the same private
// copies: each word of y is read once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "field/check_kernels.h"
#include "field/weights.h"
#include "pads/keys.h"

namespace tsqp {

inline constexpr std::size_t kMaxVectors = 16;

// Which pads blind the rows of a call: those of a Linear's rows from the first on.
struct PadsOfRows {
    const PadKeys& keys;
    std::size_t linear;
    std::uint64_t first_row;
};

class FieldCheck {
  public:
    // vectors [num_vectors, outputs], words in [0, p). Copies of the weights' scales and bias
    // are kept. Raises invalid_argument for a word that is not in the field, and for other than 1 to
    // kMaxVectors.
    FieldCheck(const CheckKernels& kernels, const FieldWeights& weights, const std::uint32_t* vectors,
               std::size_t num_vectors);

    std::size_t inputs() const { return inputs_; }
    std::size_t outputs() const { return outputs_; }
    std::size_t num_vectors() const { return num_vectors_; }
    std::size_t num_bytes() const;
    // FieldWeights::fingerprint.
    std::uint64_t fingerprint() const { return fingerprint_; }

    // Asks for what begin and finish will read besides their rows: for who waits anyway, as with few rows these
    // reads take longer than all the rest.
    void fetch() const;

    // x [rows, inputs] f32, private  ->  m = xq mod p [rows, inputs], memory of the other side, written by
    // whole words: rows are of an even width. What `finish` needs: scales [rows], sums [rows, num_vectors],
    // <m, Ws> in [0, p). A row with a NaN or an infinity is zeros, and its scale NaN. `copy` gets m too, or
    // is null. With pads, m = xq - r mod p; null: nothing blinds them.
    void begin(const FieldKernels& field, const CheckKernels& kernels, const float* x, std::size_t rows,
               std::uint32_t* m, float* scales, std::uint32_t* sums, std::uint32_t* copy,
               const PadsOfRows* pads = nullptr) const;

    // y [rows, outputs], memory of the other side, backed up to the end of its last word of 8 bytes  ->  out
    // [rows, outputs] f32, private. True where every word is below p and every row's sums hold; else out is
    // unspecified. `copy` gets y too, or is null. pads [rows]: rW [outputs] of each row that was blinded, null
    // for one that was not; or null.
    bool finish(const CheckKernels& kernels, const std::uint32_t* y, std::size_t rows, const float* scales,
                const std::uint32_t* sums, float* out, std::uint32_t* copy,
                const std::uint32_t* const* pads = nullptr) const;

  private:
    // Some rows of one call, at most kCheckRows.
    struct Rows {
        std::size_t count;
        bool are_few;  // all of the call: then what they are checked with has to be asked for ahead
        const std::uint32_t* y;
        const float* scales;
        float* out;
        std::uint32_t* copy;
        const std::uint32_t* const* pads;
        const std::uint32_t* const* pads_end;  // of all rows of the call
    };
    // Their words [begin, end); begin is whole runs. Adds to sums [count, num_vectors], returns the largest
    // word.
    std::uint32_t finish_words(const CheckKernels& kernels, const Rows& rows, std::size_t begin,
                               std::size_t end, std::int64_t* sums) const;
    void ask_for_run(std::size_t first, std::size_t end) const;
    // Pads come out of memory: those of a row's next run are asked for while one is worked on, and with the first run
    // of a piece [begin, end) of the row that is next in its place.
    static void ask_for_pads(const Rows& rows, std::size_t row, std::size_t begin, std::size_t first,
                             std::size_t end);

    std::size_t inputs_, outputs_, num_vectors_;
    std::size_t padded_inputs_, padded_outputs_;
    std::uint64_t squares_limit_, fingerprint_;
    std::vector<float> scales_, bias_;
    std::vector<std::int32_t> vectors_;   // [num_vectors, padded_outputs], centred
    std::vector<std::int32_t> products_;  // Ws [num_vectors, padded_inputs], centred
};

}  // namespace tsqp
