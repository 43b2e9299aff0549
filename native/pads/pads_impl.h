// The kernels of pad_kernels.h over a type `L` of 32-bit lanes, which each pads_<isa>.cpp brings with the
// processor's instructions for AES.
//
// A piece of a row stays in registers from its counters to the words that are written. `L::write` crosses the
// border, by whole words; `L::load` and `L::store` are for private memory. Everything is in an anonymous
// namespace, and nothing of std is called: see kernels_impl.h.
#pragma once

#include "pads/pad_kernels.h"
#include "pads/wipe.h"

namespace tsqp {
namespace {

// Named and not an array, which gcc 12 keeps in memory.
template <class Of, std::size_t N>
struct Registers : Registers<Of, N - 1> {
    typename Of::Register one;
};
template <class Of>
struct Registers<Of, 0> {};

// function(register, index) of each, ascending.
template <std::size_t N, class Of, class Function>
[[gnu::always_inline]] inline void each(Registers<Of, N>& registers, const Function& function) {
    if constexpr (N > 0) {
        each<N - 1, Of>(registers, function);
        function(registers.one, N - 1);
    }
}

template <class L>
struct Pads {
    using Words = typename L::Words;
    using Blocks = typename L::Blocks;  // the same bytes, as the instructions for AES have them
    struct OfWords {
        using Register = Words;
    };
    struct OfBlocks {
        using Register = Blocks;
    };
    static constexpr std::size_t kWidth = L::kWidth, kBlockWords = kAesBlockBytes / sizeof(std::uint32_t);
    static constexpr std::size_t kRegisters = L::kRegisters;

    // The stream of a key and a row.
    class Made {
      public:
        explicit Made(const PadRow& row) : schedule_(*row.schedule), start_(L::start(row)) {}

        // Words [first, first + N registers); `first` begins a block.
        template <std::size_t N>
        [[gnu::always_inline]] void fill(Registers<OfWords, N>& piece, std::size_t first) const {
            Registers<OfBlocks, N> states;
            const auto begin = static_cast<std::uint32_t>(first / kBlockWords);
            each<N>(states, [&](Blocks& state, std::size_t i) __attribute__((always_inline)) {
                state = L::begun(start_, begin, static_cast<int>(i * (kWidth / kBlockWords)));
            });
            for (std::size_t round = 1; round < kAesRounds; ++round) {
                const auto key = L::key(schedule_, round);
                each<N>(states, [&](Blocks& state, std::size_t)
                                    __attribute__((always_inline)) { state = L::round(state, key); });
            }
            const auto key = L::key(schedule_, kAesRounds);
            each<N>(states, [&](Blocks& state, std::size_t)
                                __attribute__((always_inline)) { state = L::last_round(state, key); });
            give<N>(states, piece);
        }

      private:
        template <std::size_t N>
        [[gnu::always_inline]] static void give(const Registers<OfBlocks, N>& states,
                                                Registers<OfWords, N>& piece) {
            if constexpr (N > 0) {
                give<N - 1>(states, piece);
                piece.one = L::words(states.one);
            }
        }

        const AesSchedule& schedule_;
        const Blocks start_;
    };

    class Given {
      public:
        explicit Given(const GivenRow& row) : stream_(row.stream) {}
        template <std::size_t N>
        void fill(Registers<OfWords, N>& piece, std::size_t first) const {
            each<N>(piece, [&](Words& words, std::size_t i) {
                std::int32_t lanes[kWidth];
                __builtin_memcpy(lanes, stream_ + (first + i * kWidth) * sizeof *lanes, sizeof lanes);
                words = L::load(lanes);
            });
        }

      private:
        const std::uint8_t* stream_;
    };

    // Writes r.
    struct Drawing {
        std::uint32_t* r;
        [[gnu::always_inline]] void take(Words pads, std::size_t at) const {
            L::store(reinterpret_cast<std::int32_t*>(r + at), pads);
        }
        void take_some(Words pads, std::size_t at, std::size_t count) const {
            L::store_some(reinterpret_cast<std::int32_t*>(r + at), pads, count);
        }
    };

    // Writes integers - r.
    struct Masking {
        const MaskArgs& args;
        // integers in [0, p), less pads: whichever of two words, the other being below zero or past p, is in
        // [0, p).
        [[gnu::always_inline]] static Words masked(Words integers, Words pads) {
            const Words prime = L::prime();
            const Words difference = L::sub(L::min(integers, L::add(integers, prime)), pads);
            return L::min(difference, L::add(difference, prime));
        }
        [[gnu::always_inline]] void take(Words pads, std::size_t at) const {
            const Words m = masked(L::load(args.integers + at), pads);
            L::store(args.integers + at, L::centred(m));
            L::write(args.m + at, m);
            if (args.copy != nullptr) L::store(reinterpret_cast<std::int32_t*>(args.copy + at), m);
        }
        void take_some(Words pads, std::size_t at, std::size_t count) const {
            const Words m = masked(L::load_some(args.integers + at, count), pads);
            L::store_some(args.integers + at, L::centred(m), count);
            L::write_some(args.m + at, m, count);
            if (args.copy != nullptr)
                L::store_some(reinterpret_cast<std::int32_t*>(args.copy + at), m, count);
        }
    };

    // One row: its pieces in ascending order, and where a word was p the next from behind the row's words.
    template <class Stream, class Taking>
    class Row {
      public:
        Row(const Stream& stream, const Taking& taking, std::size_t inputs)
            : stream_(stream), taking_(taking), inputs_(inputs), replacement_(inputs) {}

        void take() {
            std::size_t first = 0;
            for (; inputs_ - first >= kRegisters * kWidth; first += kRegisters * kWidth)
                take_piece<kRegisters>(first);
            take_rest<kRegisters / 2>(first);
        }

      private:
        template <std::size_t N>
        void take_rest(std::size_t first) {
            if constexpr (N > 0) {
                if (inputs_ - first >= N * kWidth) {
                    take_piece<N>(first);
                    first += N * kWidth;
                }
                take_rest<N / 2>(first);
            } else if (first < inputs_) {
                Registers<OfWords, 1> piece;
                fill<1>(piece, first, inputs_ - first);
                taking_.take_some(piece.one, first, inputs_ - first);
            }
        }

        template <std::size_t N>
        [[gnu::always_inline]] void take_piece(std::size_t first) {
            Registers<OfWords, N> piece;
            fill<N>(piece, first, N * kWidth);
            each<N>(piece, [&](Words& pads, std::size_t i)
                               __attribute__((always_inline)) { taking_.take(pads, first + i * kWidth); });
        }

        // Pads of `count` words; what is behind them is not to be used.
        template <std::size_t N>
        [[gnu::always_inline]] void fill(Registers<OfWords, N>& piece, std::size_t first, std::size_t count) {
            stream_.template fill<N>(piece, first);
            Words largest = L::zero();
            each<N>(piece, [&](Words& words, std::size_t) __attribute__((always_inline)) {
                words = L::and_(words, L::prime());
                largest = L::max(largest, words);
            });
            if (L::has_prime(largest)) [[unlikely]] {
                // Of the copy the address is taken: the piece itself stays in registers.
                Registers<OfWords, N> copy = piece;
                replace<N>(copy, count);
                piece = copy;
            }
        }

        template <std::size_t N>
        [[gnu::noinline, gnu::cold]] void replace(Registers<OfWords, N>& piece, std::size_t count) {
            std::int32_t words[N * kWidth];
            each<N>(piece, [&](Words& pads, std::size_t i) { L::store(words + i * kWidth, pads); });
            for (std::size_t i = 0; i < count; ++i)
                while (words[i] == static_cast<std::int32_t>(kPrime)) words[i] = next_replacement();
            each<N>(piece, [&](Words& pads, std::size_t i) { pads = L::load(words + i * kWidth); });
        }

        [[gnu::noinline, gnu::cold]] std::int32_t next_replacement() {
            const std::size_t first = replacement_ / kWidth * kWidth;
            Registers<OfWords, 1> piece;
            stream_.template fill<1>(piece, first);
            std::int32_t words[kWidth];
            L::store(words, L::and_(piece.one, L::prime()));
            return words[replacement_++ - first];
        }

        const Stream stream_;
        const Taking taking_;
        const std::size_t inputs_;
        std::size_t replacement_;
    };

    template <class Stream, class Taking, class Of>
    [[gnu::noinline]] static void take_row(const Of& row, const Taking& taking, std::size_t inputs) {
        Row<Stream, Taking>(Stream(row), taking, inputs).take();
    }
    template <class Stream, class Of>
    static void draw(const Of& row, std::size_t inputs, std::uint32_t* r) noexcept {
        take_row<Stream>(row, Drawing{r}, inputs);
        burn_stack();
    }
    template <class Stream, class Of>
    static void mask(const Of& row, const MaskArgs& args) noexcept {
        take_row<Stream>(row, Masking{args}, args.inputs);
        burn_stack();
    }

    static constexpr PadKernels kernels(const char* name) {
        return {name, draw<Made, PadRow>, draw<Given, GivenRow>, mask<Made, PadRow>, mask<Given, GivenRow>};
    }
};

}  // namespace
}  // namespace tsqp
