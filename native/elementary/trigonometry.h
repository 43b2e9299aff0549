// Sine and cosine, the same on every machine: those of a C library and of numpy depend on the processor.
#pragma once

#include <cstdint>

#include "elementary/double_double.h"
#include "elementary/series.h"

namespace tsqp {

struct SineCosine {
    double sine, cosine;
};

// The largest of 2^20 positions, at a frequency of 10^6, lies below.
inline constexpr double kLargestAngle = 0x1p40;

// Sine and cosine of an angle in radians, which is kLargestAngle at most.
//
//   Numerics: within 1 ULP of f64 of exact, so what is rounded to f32 once is within 0.50001 ULP.
//   Source:   the method of fdlibm: the nearest multiple of pi/2, in three parts of 53 bits here, is taken
//   off,
//             which leaves a rest in two doubles; then the Taylor series of both functions.
inline SineCosine sine_and_cosine(double angle) {
    constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
    constexpr double kHalfPi[] = {0x1.921fb54442d18p+0, 0x1.1a62633145c07p-54, -0x1.f1976b7ed8fbcp-110};
    const double quarters = nearest_whole(angle * kTwoOverPi);
    const DoubleDouble first = exact_product(quarters, kHalfPi[0]),
                       second = exact_product(quarters, kHalfPi[1]);
    // The angle and what is taken off are so near each other that their difference is exact.
    DoubleDouble rest = exact_sum(angle - first.high, -first.low);
    const DoubleDouble finer = exact_sum(rest.high, -second.high);
    rest = exact_sum(finer.high, finer.low + (rest.low - second.low - quarters * kHalfPi[2]));

    // r - r^3/3! + ... + r^17/17!, and 1 - r^2/2! + ... + r^16/16!, |r| <= pi/4: what is left out is below
    // 3e-18.
    const double r = rest.high, squared = r * r;
    const double cubic = reciprocal_factorials<3, 2, 17>(squared),
                 quartic = reciprocal_factorials<4, 2, 16>(squared);
    const double sine = r + (squared * r * cubic + rest.low * (1.0 - 0.5 * squared));
    const double cosine = 1.0 + (squared * (squared * quartic - 0.5) - r * rest.low);
    switch (static_cast<std::int64_t>(quarters) & 3) {
        case 0:
            return {sine, cosine};
        case 1:
            return {cosine, -sine};
        case 2:
            return {-sine, -cosine};
        default:
            return {-cosine, sine};
    }
}

}  // namespace tsqp
