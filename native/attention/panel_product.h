// The product inside attention: rows of f32, which are scores or queries, times a matrix of the cache.
//
// The matrix [rows, columns] of E lies as attention.h says: f32 row by row, bf16 by pairs of rows. A sum runs
// over rows in order, so no result depends on how many rows or columns are made at once.
#pragma once

#include "kernels/lanes.h"

namespace tsqp {
namespace {

template <std::size_t I>
struct Constant {
    static constexpr std::size_t value = I;
};
template <std::size_t... I>
struct Sequence {};
template <std::size_t N, std::size_t... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <std::size_t... I>
struct CountTo<0, I...> {
    using Type = Sequence<I...>;
};

template <class Body, std::size_t... I>
[[gnu::always_inline]] constexpr void each(Body body, Sequence<I...>) {
    (body(Constant<I>{}), ...);
}
// body(Constant<0>), .., body(Constant<N - 1>). NOTE: gcc 12 keeps an array that a loop indexes in memory,
// even where it unrolls the loop; with constants it stays in registers.
template <std::size_t N, class Body>
[[gnu::always_inline]] constexpr void unrolled(Body body) {
    each(body, typename CountTo<N>::Type{});
}

template <class E>
struct Matrix {
    const E* elements;
    std::size_t columns;
    std::ptrdiff_t ahead_bytes;  // from each element to one that is wanted soon
};

template <class L, class E>
struct PanelProduct {
    using V = typename L::V;

    // c[i, 0..] (+)= sum over r in [begin, end) of a[i, r] * matrix[r, column ..], M rows, N blocks of lanes.
    template <std::size_t M, std::size_t N>
    [[gnu::noinline]] static void part(const float* a, std::size_t a_stride, const Matrix<E>& matrix,
                                       std::size_t column, std::size_t begin, std::size_t end, float* c,
                                       std::size_t c_stride, bool add) {
        V sums[M][N];
        unrolled<M>([&](auto i) __attribute__((always_inline)) {
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                sums[i.value][j.value] =
                    add ? L::load(c + i.value * c_stride + j.value * kLanes, Full{}) : L::set(0.0f);
            });
        });
        const auto take = [&](const V(&row)[N], std::size_t r) __attribute__((always_inline)) {
            unrolled<M>([&](auto i) __attribute__((always_inline)) {
                const V x = L::set(a[i.value * a_stride + r]);
                unrolled<N>([&](auto j) __attribute__((always_inline)) {
                    sums[i.value][j.value] = L::fma(x, row[j.value], sums[i.value][j.value]);
                });
            });
        };
        std::size_t r = begin;
        if (r % 2 != 0 && r < end) {
            V even[N], odd[N];
            load_pairs<N>(matrix, r / 2, column, even, odd);
            take(odd, r++);
        }
        for (; r + 2 <= end; r += 2) {
            V even[N], odd[N];
            load_pairs<N>(matrix, r / 2, column, even, odd);
            take(even, r);
            take(odd, r + 1);
        }
        if (r < end) {
            V even[N], odd[N];
            load_pairs<N>(matrix, r / 2, column, even, odd);
            take(even, r);
        }
        unrolled<M>([&](auto i) __attribute__((always_inline)) {
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                L::store(c + i.value * c_stride + j.value * kLanes, sums[i.value][j.value], Full{});
            });
        });
    }

    // The rows 2 pair and 2 pair + 1, N blocks of lanes of each.
    template <std::size_t N>
    [[gnu::always_inline]] static void load_pairs(const Matrix<E>& matrix, std::size_t pair,
                                                  std::size_t column, V (&even)[N], V (&odd)[N]) {
        if constexpr (sizeof(E) == sizeof(Bf16)) {
            const E* from = matrix.elements + (pair * matrix.columns + column) * 2;
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                prefetch(from + 2 * kLanes * j.value, matrix.ahead_bytes);
                L::load_pairs(from + 2 * kLanes * j.value, even[j.value], odd[j.value]);
            });
        } else {
            const E* from = matrix.elements + pair * 2 * matrix.columns + column;
            unrolled<N>([&](auto j) __attribute__((always_inline)) {
                prefetch(from + kLanes * j.value, matrix.ahead_bytes);
                prefetch(from + matrix.columns + kLanes * j.value, matrix.ahead_bytes);
                even[j.value] = L::load(from + kLanes * j.value, Full{});
                odd[j.value] = L::load(from + matrix.columns + kLanes * j.value, Full{});
            });
        }
    }
    // The address may be outside of any object: nothing is read there.
    [[gnu::always_inline]] static void prefetch(const E* from, std::ptrdiff_t ahead_bytes) {
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) +
                                                         static_cast<std::uintptr_t>(ahead_bytes)));
    }

    // The same for any number of rows and all columns of the matrix.
    static void multiply(std::size_t rows, const float* a, std::size_t a_stride, const Matrix<E>& matrix,
                         std::size_t begin, std::size_t end, float* c, std::size_t c_stride, bool add) {
        constexpr std::size_t kRows = L::kProductRows, kBlocks = L::kProductBlocks;
        for (std::size_t i = 0; i < rows; i += kRows)
            for (std::size_t column = 0; column < matrix.columns; column += kBlocks * kLanes) {
                const std::size_t m = rows - i < kRows ? rows - i : kRows;
                const std::size_t left = (matrix.columns - column) / kLanes,
                                  n = left < kBlocks ? left : kBlocks;
                kParts.of[m - 1][n - 1](a + i * a_stride, a_stride, matrix, column, begin, end,
                                        c + i * c_stride + column, c_stride, add);
            }
    }

  private:
    using Part = void (*)(const float*, std::size_t, const Matrix<E>&, std::size_t, std::size_t, std::size_t,
                          float*, std::size_t, bool);
    struct Parts {
        Part of[L::kProductRows][L::kProductBlocks];
    };
    static constexpr Parts all_parts() {
        Parts parts{};
        unrolled<L::kProductRows>([&](auto i) {
            unrolled<L::kProductBlocks>(
                [&](auto j) { parts.of[i.value][j.value] = part<i.value + 1, j.value + 1>; });
        });
        return parts;
    }
    static constexpr Parts kParts = all_parts();
};

}  // namespace
}  // namespace tsqp
