// The oracle of pad_kernels.h: as it is written, one word at a time.

#include <cstring>

#include "border/words.h"
#include "field/check_kernels.h"
#include "pads/pad_kernels.h"
#include "pads/wipe.h"

namespace tsqp {
namespace {

class Made {
  public:
    explicit Made(const PadRow& row) : aes_(*row.schedule), row_(row.row) {}

    std::uint32_t word(std::size_t index) {
        const std::size_t at = index * sizeof(std::uint32_t), first = at / kPlainBytes * kPlainBlocks;
        if (first != first_) make(first);
        std::uint32_t word;
        std::memcpy(&word, blocks_ + at % kPlainBytes, sizeof word);
        return word;
    }

  private:
    static void store_big_endian(std::uint64_t value, std::uint8_t* to, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i)
            to[i] = static_cast<std::uint8_t>(value >> (8 * (size - 1 - i)));
    }
    void make(std::size_t first) {
        std::memset(blocks_, 0, sizeof blocks_);
        for (std::size_t i = 0; i < kPlainBlocks; ++i) {
            std::uint8_t* const block = blocks_ + i * kAesBlockBytes;
            store_big_endian(row_, block + 4, 8);
            store_big_endian(first + i, block + 12, 4);
        }
        aes_.encrypt(blocks_);
        first_ = first;
    }

    const PlainAes aes_;
    const std::uint64_t row_;
    std::uint8_t blocks_[kPlainBytes];
    std::size_t first_ = SIZE_MAX;  // of the blocks that are there
};

class Given {
  public:
    explicit Given(const GivenRow& row) : stream_(row.stream) {}
    std::uint32_t word(std::size_t index) {
        std::uint32_t word;
        std::memcpy(&word, stream_ + index * sizeof word, sizeof word);
        return word;
    }

  private:
    const std::uint8_t* stream_;
};

// r[k] in ascending k.
template <class Stream>
class Pads {
  public:
    template <class Row>
    Pads(const Row& row, std::size_t inputs) : stream_(row), replacement_(inputs) {}

    std::uint32_t pad(std::size_t k) {
        std::uint32_t word = stream_.word(k) & kPrime;
        while (word == kPrime) word = stream_.word(replacement_++) & kPrime;
        return word;
    }

  private:
    Stream stream_;
    std::size_t replacement_;
};

template <class Stream, class Row>
[[gnu::noinline]] void draw_row(const Row& row, std::size_t inputs, std::uint32_t* r) {
    Pads<Stream> pads(row, inputs);
    for (std::size_t k = 0; k < inputs; ++k) r[k] = pads.pad(k);
}

template <class Stream, class Row>
[[gnu::noinline]] void mask_row(const Row& row, const MaskArgs& args) {
    Pads<Stream> pads(row, args.inputs);
    for (std::size_t k = 0; k < args.inputs; k += 2) {
        std::uint32_t pair[2];
        for (std::size_t i = 0; i < 2; ++i) {
            pair[i] = residue(std::int64_t{args.integers[k + i]} - pads.pad(k + i));
            args.integers[k + i] = centred(pair[i]);
        }
        write_words(args.m + k, pair, sizeof pair);
        if (args.copy != nullptr) std::memcpy(args.copy + k, pair, sizeof pair);
    }
}

template <class Stream, class Row>
void draw(const Row& row, std::size_t inputs, std::uint32_t* r) noexcept {
    draw_row<Stream>(row, inputs, r);
    burn_stack();
}

template <class Stream, class Row>
void mask(const Row& row, const MaskArgs& args) noexcept {
    mask_row<Stream>(row, args);
    burn_stack();
}

}  // namespace

constinit const PadKernels kScalarPads{"scalar", draw<Made, PadRow>, draw<Given, GivenRow>,
                                       mask<Made, PadRow>, mask<Given, GivenRow>};

}  // namespace tsqp
