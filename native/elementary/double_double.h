// A number as the sum of two doubles, by the plain additions and products that every processor rounds alike.
//
// NOTE(numerics): no fused multiply-add, which not every machine has; the build forbids contraction.
#pragma once

namespace tsqp {

struct DoubleDouble {
    double high, low;
};

// a + b exactly, whichever is larger. Source: Knuth, TAOCP 4.2.2, theorem B.
inline DoubleDouble exact_sum(double a, double b) {
    const double sum = a + b, of_b = sum - a;
    return {sum, (a - (sum - of_b)) + (b - of_b)};
}

// a * b exactly, |a| and |b| below 2^995. Source: Dekker 1971, Veltkamp's split.
inline DoubleDouble exact_product(double a, double b) {
    constexpr double kSplit = 134217729.0;  // 2^27 + 1
    const double a_scaled = kSplit * a, b_scaled = kSplit * b;
    const double a_high = a_scaled - (a_scaled - a), a_low = a - a_high;
    const double b_high = b_scaled - (b_scaled - b), b_low = b - b_high;
    const double product = a * b;
    return {product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
}

// The nearest whole number, of two equally near the even one; |x| below 2^51.
inline double nearest_whole(double x) {
    constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: beside it a double has no fraction
    return (x + kShift) - kShift;
}

}  // namespace tsqp
