// The kernels of kernels.h over a type `L` of 16 f32 lanes (lanes.h).
#pragma once

#include "kernels/lanes.h"

namespace tsqp {
namespace {

template <class L>
struct Kernels {
    using V = typename L::V;

    // -1 / m for m in [-2, -1] or NaN, to 2^-18, where a division would take longer than all the rest: the
    // cubic whose error is a Chebyshev polynomial, 1 / 577, and a step of Newton, which squares it.
    [[gnu::always_inline]] static V negated_reciprocal(V m) {
        V r = L::fma(L::set(128.0f / 577.0f), m, L::set(768.0f / 577.0f));
        r = L::fma(r, m, L::set(1696.0f / 577.0f));
        r = L::fma(r, m, L::set(1632.0f / 577.0f));
        return L::fma(r, L::fma(m, r, L::set(1.0f)), r);
    }

    static void exp_kernel(const ExpArgs& args, std::size_t begin, std::size_t end) noexcept {
        for_each_block(end - begin, [&](std::size_t i, auto part) {
            L::store(args.to + begin + i, exp_nonpositive<L, float>(L::load(args.from + begin + i, part)),
                     part);
        });
    }

    template <class E>
    static void add_rms_norm(const AddRmsNormArgs& args, std::size_t begin, std::size_t end) noexcept {
        const std::size_t size = args.hidden;
        for (std::size_t item = begin; item < end; ++item) {
            const std::size_t row =
                args.row_index ? static_cast<std::size_t>(args.row_index[item]) : args.first_row + item;
            float* residual = args.residual + row * size;
            V squares = L::set(0.0f);
            if (args.delta) {
                const E* delta = static_cast<const E*>(args.delta) + row * size;
                for_each_block(size, [&](std::size_t i, auto part) {
                    const V x = L::add(L::load(residual + i, part), L::read(delta + i, part));
                    L::store(residual + i, x, part);
                    squares = L::add(squares, L::mul(x, x));
                });
            } else {
                for_each_block(size, [&](std::size_t i, auto part) {
                    const V x = L::load(residual + i, part);
                    squares = L::add(squares, L::mul(x, x));
                });
            }
            const float mean = sum_lanes<L>(squares) / static_cast<float>(size);
            const V inverse = L::set(1.0f / __builtin_sqrtf(mean + args.eps));
            E* out = static_cast<E*>(args.out) + item * size;
            for_each_block(size, [&](std::size_t i, auto part) {
                const V normed = L::mul(L::load(residual + i, part), inverse);
                L::write(out + i, L::mul(normed, L::load(args.weight + i, part)), part);
            });
        }
    }

    template <class E>
    static void load(const LoadArgs& args, std::size_t begin, std::size_t end) noexcept {
        const E* from = static_cast<const E*>(args.from) + begin;
        for_each_block(end - begin, [&](std::size_t i, auto part) {
            L::store(args.to + begin + i, L::read(from + i, part), part);
        });
    }

    template <class E>
    static void store(const StoreArgs& args, std::size_t begin, std::size_t end) noexcept {
        E* to = static_cast<E*>(args.to) + begin;
        for_each_block(end - begin, [&](std::size_t i, auto part) {
            L::write(to + i, L::load(args.from + begin + i, part), part);
        });
    }

    template <class E>
    static void rope(const RopeArgs& args, float* scratch, std::size_t begin, std::size_t end) noexcept {
        const std::size_t size = args.head_dim, half = size / 2;
        float* const first = scratch;
        float* const second = scratch + half;
        for (std::size_t item = begin; item < end; ++item) {
            const std::size_t position = static_cast<std::size_t>(args.positions[item]);
            const float* cos = args.cos + position * half;
            const float* sin = args.sin + position * half;
            E* row = static_cast<E*>(args.qk) + item * args.row_elements;
            for (std::size_t head = 0; head < args.num_heads; ++head, row += size) {
                if (is_whole_words(half * sizeof(E))) {
                    for_each_block(half, [&](std::size_t i, auto part) {
                        const V c = L::load(cos + i, part), s = L::load(sin + i, part);
                        const V x1 = L::read(row + i, part), x2 = L::read(row + half + i, part);
                        L::write(row + i, L::sub(L::mul(x1, c), L::mul(x2, s)), part);
                        L::write(row + half + i, L::add(L::mul(x2, c), L::mul(x1, s)), part);
                    });
                    continue;
                }
                // Half a head ends inside a word: a private copy is rotated.
                for_each_block(size, [&](std::size_t i, auto part) {
                    L::store(scratch + i, L::read(row + i, part), part);
                });
                for_each_block(half, [&](std::size_t i, auto part) {
                    const V c = L::load(cos + i, part), s = L::load(sin + i, part);
                    const V x1 = L::load(first + i, part), x2 = L::load(second + i, part);
                    L::store(first + i, L::sub(L::mul(x1, c), L::mul(x2, s)), part);
                    L::store(second + i, L::add(L::mul(x2, c), L::mul(x1, s)), part);
                });
                for_each_block(size, [&](std::size_t i, auto part) {
                    L::write(row + i, L::load(scratch + i, part), part);
                });
            }
        }
    }

    template <class E>
    static void clear(E* row, std::size_t begin, std::size_t end) {
        // Opaque, or the compiler would call memset, which chooses its own pieces.
        const V zero = L::opaque(L::set(0.0f));
        for (std::size_t i = begin; i < end; i += kLanes) L::write(row + i, zero, Full{});
    }

    // `x` in the lanes of `seen`, `other` in the rest.
    static V keep(V x, V, Full) { return x; }
    static V keep(V x, V other, Between seen) { return L::select(x, other, seen); }
    static V keep(V x, V other, Partial part) { return L::select(x, other, Between{0, part.count}); }

    // Softmax of elements [lo, hi), lo < hi, of a row of whole blocks, in place; the others become 0.
    template <class E>
    static void softmax_row(E* row, std::size_t lo, std::size_t hi, std::size_t size, float scale,
                            float* scratch) {
        const float infinity = __builtin_inff();
        const V factor = L::set(scale), none = L::set(-infinity), zero = L::set(0.0f);
        V maxima = none;
        // UNTRUSTED: the only read of the row; what follows works on the private copy. Lanes outside hold
        // -inf, so exp makes them 0.
        for_each_block(lo, hi, [&](std::size_t i, auto seen) {
            const V x = keep(L::read(row + i, Full{}), none, seen);
            L::store(scratch + i, x, Full{});
            maxima = L::max(x, maxima);  // passes over a NaN
        });
        const float maximum = max_lanes<L>(maxima);
        if (maximum == -infinity && !any_nan(scratch + lo, hi - lo)) return clear(row, 0, size);
        const std::size_t begin = lo / kLanes * kLanes, end = (hi + kLanes - 1) / kLanes * kLanes;
        const V highest = L::set(maximum);
        V sums = zero;
        for (std::size_t i = begin; i < end; i += kLanes) {
            const V e = exp_nonpositive<L, E>(L::mul(L::sub(L::load(scratch + i, Full{}), highest), factor));
            L::store(scratch + i, e, Full{});
            sums = L::add(sums, e);
        }
        const V inverse = L::set(1.0f / sum_lanes<L>(sums));
        clear(row, 0, begin);
        for_each_block(lo, hi, [&](std::size_t i, auto seen) {
            // The sum may be NaN, and zero times NaN would be.
            L::write(row + i, keep(L::mul(L::load(scratch + i, Full{}), inverse), zero, seen), Full{});
        });
        clear(row, end, size);
    }

    static bool any_nan(const float* x, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i)
            if (x[i] != x[i]) return true;
        return false;
    }

    template <class E>
    static void softmax(const SoftmaxArgs& args, float* scratch, std::size_t begin,
                        std::size_t end) noexcept {
        const std::size_t columns = args.num_columns;
        for (std::size_t item = begin; item < end; ++item) {
            E* row = static_cast<E*>(args.scores) + item * columns;
            const std::size_t r = item % args.rows;
            // Written without first_valid_end + r, which could wrap.
            const bool all = args.first_valid_end >= columns || r >= columns - args.first_valid_end;
            const std::size_t hi = all ? columns : args.first_valid_end + r;
            const std::size_t lo = args.window != 0 && hi > args.window ? hi - args.window : 0;
            if (hi > lo)
                softmax_row(row, lo, hi, columns, args.scale, scratch);
            else
                clear(row, 0, columns);
        }
    }

    template <class E>
    static void silu_mul(const SiluMulArgs& args, std::size_t begin, std::size_t end) noexcept {
        const std::size_t size = args.features;
        for (std::size_t item = begin; item < end; ++item) {
            const E* gates = static_cast<const E*>(args.gate_up) + item * 2 * size;
            const E* ups = gates + size;
            E* out = static_cast<E*>(args.out) + item * size;
            for_each_block(size, [&](std::size_t i, auto part) {
                const V gate = L::read(gates + i, part);
                const V e = exp_nonpositive<L, E>(L::negative_abs(gate));
                const V numerator = L::mul_where_negative(gate, e);
                V silu;
                if constexpr (sizeof(E) == sizeof(Bf16))
                    silu = L::mul(numerator, negated_reciprocal(L::sub(L::set(-1.0f), e)));
                else
                    silu = L::div(numerator, L::add(L::set(1.0f), e));
                L::write(out + i, L::mul(silu, L::read(ups + i, part)), part);
            });
        }
    }

    static bool logit_maxima(const LogitMaximaArgs& args) noexcept {
        const V none = L::set(-__builtin_inff());
        V differences = L::set(0.0f);  // x - x is 0 for a number and else NaN, which a sum keeps
        for (std::size_t first = 0, block = 0; first < args.size; first += kLogitBlock, ++block) {
            const std::size_t left = args.size - first;
            V maxima = none;
            for_each_block(left < kLogitBlock ? left : kLogitBlock, [&](std::size_t i, auto part) {
                const V x = keep(L::load(args.logits + first + i, part), none, part);
                maxima = L::max(x, maxima);
                differences = L::add(differences, keep(L::sub(x, x), L::set(0.0f), part));
            });
            args.maxima[block] = max_lanes<L>(maxima);
        }
        return sum_lanes<L>(differences) == 0.0f;
    }

    static void logit_weights(const LogitWeightsArgs& args, std::size_t begin, std::size_t end) noexcept {
        const V highest = L::set(args.maximum), factor = L::set(args.factor);
        const V unit = L::set(static_cast<float>(kLargestWeight));
        for_each_block(end - begin, [&](std::size_t i, auto part) {
            const V x = L::mul(L::sub(L::load(args.logits + begin + i, part), highest), factor);
            L::store_rounded(args.weights + begin + i, L::mul(exp_nonpositive<L, float>(x), unit), part);
        });
    }

    template <class E>
    static constexpr ElementKernels for_element() {
        return {add_rms_norm<E>, load<E>, store<E>, rope<E>, softmax<E>, silu_mul<E>};
    }

    static constexpr KernelTable table(const char* name) {
        return {name, for_element<Bf16>(), for_element<float>(), exp_kernel, logit_maxima, logit_weights};
    }
};

}  // namespace
}  // namespace tsqp
