// The kernels of check_kernels.h over a type `L` of 32-bit lanes, which each check_<isa>.cpp brings.
//
// `L::read` and `L::write` cross the border, by whole words; `L::load` and `L::store` are for private memory.
// Everything is in an anonymous namespace, and nothing of std is called: see kernels_impl.h.
#pragma once

#include "border/words.h"
#include "field/check_kernels.h"

namespace tsqp {
namespace {

// The sums of some rows with one vector or two. Named and not an array, which gcc 12 keeps in memory.
template <class L, std::size_t Rows>
struct DotSums : DotSums<L, Rows - 1> {
    typename L::Integers first, second;
};
template <class L>
struct DotSums<L, 0> {};

// The sums of one digit row or more over the outputs of a panel.
template <class L, std::size_t Rows>
struct PanelSums : PanelSums<L, Rows - 1> {
    typename L::Integers sum;
};
template <class L>
struct PanelSums<L, 0> {};

template <class L>
struct Checks {
    using Integers = typename L::Integers;
    using Floats = typename L::Floats;
    static constexpr std::size_t kWidth = L::kWidth;

    static void write_residues(const std::int32_t* integers, std::size_t size, std::uint32_t* to) noexcept {
        std::size_t i = 0;
        for (; size - i >= kWidth; i += kWidth) L::write(to + i, L::residues(L::load(integers + i)));
        if (i == size) return;
        std::int32_t rest[kWidth] = {};
        std::uint32_t words[kWidth];
        __builtin_memcpy(rest, integers + i, (size - i) * sizeof *rest);
        L::write(words, L::residues(L::load(rest)));
        write_words(to + i, words, (size - i) * sizeof *words);
    }

    template <bool Bias, bool Pads>
    struct Taking {
        Floats scale;
        Integers largest;

        // pads: of the words, unread without Pads.
        [[gnu::always_inline]] Floats add(const TakeArgs& args, std::size_t i, Integers words,
                                          const std::uint32_t* pads) {
            largest = L::max(largest, words);
            Integers integers = L::centred(words);
            L::store(args.integers + i, integers);
            if constexpr (Pads)
                integers = L::centred(
                    L::reduced(L::add(words, L::load(reinterpret_cast<const std::int32_t*>(pads)))));
            Floats result = L::mul(L::to_floats(integers), L::div(L::load(args.scales + i), scale));
            if constexpr (Bias) result = L::add(result, L::load(args.bias + i));
            return L::one_nan(result);
        }
    };

    template <bool Bias, bool Pads>
    static std::uint32_t take_words(const TakeArgs& args) {
        Taking<Bias, Pads> taking{L::set(args.scale), L::zero()};
        std::size_t i = 0;
        // UNTRUSTED: the only read of these words, into registers; what a caller sees are the private copies.
        for (; args.size - i >= kWidth; i += kWidth)
            L::store(args.out + i, taking.add(args, i, L::read(args.words + i), args.pads + i));
        if (i < args.size) {
            // UNTRUSTED: as above.
            std::uint32_t rest[kWidth] = {};
            read_words(rest, args.words + i, (args.size - i) * sizeof *rest);
            std::uint32_t pads[kWidth] = {};
            if constexpr (Pads) __builtin_memcpy(pads, args.pads + i, (args.size - i) * sizeof *pads);
            float out[kWidth];
            L::store(out, taking.add(args, i, L::load(reinterpret_cast<const std::int32_t*>(rest)), pads));
            __builtin_memcpy(args.out + i, out, (args.size - i) * sizeof *out);
            i += kWidth;
        }
        for (; i < padded_to_step(args.size); i += kWidth) L::store(args.integers + i, L::zero());
        std::uint32_t lanes[kWidth], largest = 0;
        L::store(reinterpret_cast<std::int32_t*>(lanes), taking.largest);
        for (const std::uint32_t lane : lanes) largest = lane > largest ? lane : largest;
        return largest;
    }

    static std::uint32_t take(const TakeArgs& args) noexcept {
        if (args.pads != nullptr)
            return args.bias == nullptr ? take_words<false, true>(args) : take_words<true, true>(args);
        return args.bias == nullptr ? take_words<false, false>(args) : take_words<true, false>(args);
    }

    template <std::size_t Vectors, std::size_t Rows>
    [[gnu::always_inline]] static void clear(DotSums<L, Rows>& sums) {
        if constexpr (Rows > 0) {
            clear<Vectors, Rows - 1>(sums);
            sums.first = sums.second = L::zero();
        }
    }

    template <std::size_t Vectors, std::size_t Rows>
    [[gnu::always_inline]] static void add(DotSums<L, Rows>& sums, const std::int32_t* rows,
                                           std::size_t stride, const Integers& even_first,
                                           const Integers& odd_first, const Integers& even_second,
                                           const Integers& odd_second) {
        if constexpr (Rows > 0) {
            add<Vectors, Rows - 1>(sums, rows, stride, even_first, odd_first, even_second, odd_second);
            const Integers even = L::load(rows + (Rows - 1) * stride), odd = L::odd(even);
            sums.first = L::kept(L::add_wide(
                sums.first, L::add_wide(L::mul_even(even, even_first), L::mul_even(odd, odd_first))));
            if constexpr (Vectors > 1)
                sums.second = L::kept(L::add_wide(
                    sums.second, L::add_wide(L::mul_even(even, even_second), L::mul_even(odd, odd_second))));
        }
    }

    template <std::size_t Vectors, std::size_t Rows>
    [[gnu::always_inline]] static void fold(DotSums<L, Rows>& sums) {
        if constexpr (Rows > 0) {
            fold<Vectors, Rows - 1>(sums);
            sums.first = L::folded(sums.first);
            if constexpr (Vectors > 1) sums.second = L::folded(sums.second);
        }
    }

    template <std::size_t Vectors, std::size_t Rows>
    [[gnu::always_inline]] static void give(const DotSums<L, Rows>& sums, std::int64_t* to,
                                            std::size_t stride) {
        if constexpr (Rows > 0) {
            give<Vectors, Rows - 1>(sums, to, stride);
            to[(Rows - 1) * stride] += L::sum_wide(sums.first);
            if constexpr (Vectors > 1) to[(Rows - 1) * stride + 1] += L::sum_wide(sums.second);
        }
    }

    template <std::size_t Vectors, std::size_t Rows>
    static void dots_of(const DotsArgs& args, std::size_t vector) {
        // Eight products of 2^60 and a folded sum are less than 2^63: a lane takes two products of a vector.
        constexpr std::size_t kUnfolded = 4 * kWidth;
        static_assert(kCheckStep % kUnfolded == 0);
        DotSums<L, Rows> sums;
        clear<Vectors, Rows>(sums);
        const std::int32_t* const first = args.vectors + vector * args.vector_stride;
        const std::int32_t* const second = Vectors > 1 ? first + args.vector_stride : first;
        for (std::size_t i = 0; i < args.size; i += kUnfolded) {
            for (std::size_t j = i; j < i + kUnfolded; j += kWidth) {
                const Integers even_first = L::load(first + j), even_second = L::load(second + j);
                add<Vectors, Rows>(sums, args.rows + j, args.row_stride, even_first, L::odd(even_first),
                                   even_second, L::odd(even_second));
            }
            fold<Vectors, Rows>(sums);
        }
        give<Vectors, Rows>(sums, args.sums + vector, args.num_vectors);
    }

    template <std::size_t Rows>
    static void dots_of_rows(const DotsArgs& args) {
        std::size_t vector = 0;
        for (; args.num_vectors - vector >= 2; vector += 2) dots_of<2, Rows>(args, vector);
        if (vector < args.num_vectors) dots_of<1, Rows>(args, vector);
    }

    static void dots(const DotsArgs& args) noexcept {
        switch (args.num_rows) {
            case 1:
                return dots_of_rows<1>(args);
            case 2:
                return dots_of_rows<2>(args);
            case 3:
                return dots_of_rows<3>(args);
            default:
                return dots_of_rows<kCheckRows>(args);
        }
    }

    template <std::size_t Rows>
    [[gnu::always_inline]] static void load_sums(PanelSums<L, Rows>& sums, const std::int32_t* from,
                                                 std::size_t stride) {
        if constexpr (Rows > 0) {
            load_sums<Rows - 1>(sums, from, stride);
            sums.sum = L::load(from + (Rows - 1) * stride);
        }
    }

    template <std::size_t Rows>
    [[gnu::always_inline]] static void add_pairs(PanelSums<L, Rows>& sums, const Integers& weights,
                                                 const std::int16_t* digits) {
        if constexpr (Rows > 0) {
            add_pairs<Rows - 1>(sums, weights, digits);
            sums.sum =
                L::add(sums.sum, L::mul_pairs(weights, L::four_digits(digits + (Rows - 1) * kPanelOutputs)));
        }
    }

    template <std::size_t Rows>
    [[gnu::always_inline]] static void store_sums(const PanelSums<L, Rows>& sums, std::int32_t* to,
                                                  std::size_t stride) {
        if constexpr (Rows > 0) {
            store_sums<Rows - 1>(sums, to, stride);
            L::store(to + (Rows - 1) * stride, sums.sum);
        }
    }

    template <std::size_t Rows>
    static void sum_panel_rows(const SumPanelArgs& args) {
        // Two lanes an input.
        for (std::size_t k = 0; k < args.inputs; k += kWidth / 2) {
            PanelSums<L, Rows> sums;
            load_sums<Rows>(sums, args.sums + 2 * k, 2 * args.inputs);
            for (std::size_t c = 0; c < kPanelOutputs; c += 4)
                add_pairs<Rows>(sums, L::four_weights(args.panel + k * kPanelOutputs + 4 * c),
                                args.digits + c);
            store_sums<Rows>(sums, args.sums + 2 * k, 2 * args.inputs);
        }
    }

    static void sum_panel(const SumPanelArgs& args) noexcept {
        args.digit_rows == 4 ? sum_panel_rows<4>(args) : sum_panel_rows<2>(args);
    }

    static constexpr CheckKernels kernels(const char* name) {
        return {name, write_residues, take, dots, sum_panel};
    }
};

}  // namespace
}  // namespace tsqp
