// What the kernels of every instruction set are written in: a type `L` of 16 f32 lanes, which each
// lanes_<isa>.h brings, blocks of such lanes, and the functions that are made of them alone.
//
// `L::read` and `L::write` cross the border, by whole words; `L::load` and `L::store` are for private memory.
//
// Everything is in an anonymous namespace, and nothing of std is called: a function with external linkage
// that several instruction sets compile would be merged by the linker into one copy, which might use AVX-512
// on a machine without.
#pragma once

#include <cstddef>
#include <cstdint>

#include "border/words.h"
#include "kernels/kernels.h"

namespace tsqp {
namespace {

using Bf16 = std::uint16_t;

// How many lanes of a block are elements: all, or the first `count`. The other lanes come as 0. They are not
// stored to private memory; `write` writes them as 0 where a word holds both.
struct Full {};
struct Partial {
    std::size_t count;
};
// Lanes [begin, end) of a block that is all memory.
struct Between {
    std::size_t begin, end;
};

template <class Body>
[[gnu::always_inline]] inline void for_each_block(std::size_t size, Body body) {
    std::size_t i = 0;
    for (; size - i >= kLanes; i += kLanes) body(i, Full{});
    if (i < size) body(i, Partial{size - i});
}

// The blocks of a row that hold elements [lo, hi); where the row begins, a block does.
template <class Body>
[[gnu::always_inline]] inline void for_each_block(std::size_t lo, std::size_t hi, Body body) {
    std::size_t i = lo / kLanes * kLanes;
    if (i < lo) {
        body(i, Between{lo - i, hi - i < kLanes ? hi - i : kLanes});
        i += kLanes;
    }
    for (; i + kLanes <= hi; i += kLanes) body(i, Full{});
    if (i < hi) body(i, Between{0, hi - i});
}

template <class L>
float sum_lanes(typename L::V lanes) {
    float v[kLanes];
    L::store(v, lanes, Full{});
    for (std::size_t width = kLanes / 2; width > 0; width /= 2)
        for (std::size_t i = 0; i < width; ++i) v[i] = v[i] + v[i + width];
    return v[0];
}

template <class L>
float max_lanes(typename L::V lanes) {
    float v[kLanes];
    L::store(v, lanes, Full{});
    for (std::size_t i = 1; i < kLanes; ++i) v[0] = v[i] > v[0] ? v[i] : v[0];
    return v[0];
}

// exp(x) for x <= 0 or NaN: x = n ln2 + r, |r| <= ln2 / 2, and exp(r) by a polynomial: for E = float that
// of Cephes expf, for bf16 of degree 4, whose relative error of 2^-17 is a two-hundredth of the output's
// own.
template <class L, class E>
[[gnu::always_inline]] inline typename L::V exp_nonpositive(typename L::V given) {
    using V = typename L::V;
    // Below -104 exp is under 2^-150 and rounds to 0; -inf would turn into NaN. A NaN stays one.
    const V lowest = L::set(-104.0f), x = L::max(lowest, given);
    // NOTE(numerics): adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
    const V magic = L::set(0x1.8p23f), one = L::set(1.0f);
    const V biased = L::fma(x, L::set(0x1.715476p+0f), magic);
    const V n = L::sub(biased, magic);
    V p;
    if constexpr (sizeof(E) == sizeof(Bf16)) {
        const V r = L::fma(n, L::set(-0x1.62e43p-1f), x);
        p = L::set(0x1.52258cp-5f);
        p = L::fma(p, r, L::set(0x1.571cc2p-3f));
        p = L::fma(p, r, L::set(0x1.0006b6p-1f));
        p = L::fma(p, r, one);
        p = L::fma(p, r, one);
    } else {
        // ln2 in two parts; the first has 9 bits, so n * high is exact.
        V r = L::fma(n, L::set(-0.693359375f), x);
        r = L::fma(n, L::set(2.12194440e-4f), r);
        p = L::set(1.9875691500e-4f);
        p = L::fma(p, r, L::set(1.3981999507e-3f));
        p = L::fma(p, r, L::set(8.3334519073e-3f));
        p = L::fma(p, r, L::set(4.1665795894e-2f));
        p = L::fma(p, r, L::set(1.6666665459e-1f));
        p = L::fma(p, r, L::set(5.0000001201e-1f));
        p = L::add(L::fma(p, L::mul(r, r), r), one);
    }
    // Such lanes are not scaled: a product that underflows makes the processor take a slow path.
    return L::scale_by_power_of_two(p, n, biased, given, lowest);
}

// tanh(x): below 0.625 x + x^3 P(x^2), above 1 - 2 e / (1 + e) with e = exp(-2 |x|), and the sign of x.
//
//   Numerics: within 2 ULP of f32 of exact; odd; 1 above 9.02; NaN is kept.
//   Source:   Cephes tanhf.
template <class L>
[[gnu::always_inline]] inline typename L::V hyperbolic_tangent(typename L::V x) {
    using V = typename L::V;
    const V zero = L::set(0.0f), negative = L::negative_abs(x), square = L::mul(x, x);
    V p = L::set(-5.70498872745e-3f);
    p = L::fma(p, square, L::set(2.06390887954e-2f));
    p = L::fma(p, square, L::set(-5.37397155531e-2f));
    p = L::fma(p, square, L::set(1.33314422036e-1f));
    p = L::fma(p, square, L::set(-3.33332819422e-1f));
    const V small = L::fma(L::mul(p, square), x, x);
    const V e = exp_nonpositive<L, float>(L::add(negative, negative)), one = L::set(1.0f);
    const V large = L::sub(one, L::div(L::add(e, e), L::add(one, e)));
    const V signed_large = L::select_less(x, zero, L::sub(zero, large), large);
    return L::select_less(L::set(-0.625f), negative, small, signed_large);
}

}  // namespace
}  // namespace tsqp
