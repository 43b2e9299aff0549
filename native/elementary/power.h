// Logarithm and power, the same on every machine, as sine and cosine are.
#pragma once

#include <bit>
#include <cstdint>

#include "elementary/double_double.h"
#include "elementary/series.h"

namespace tsqp {

// ln 2; the first part has 21 bits to spare, so that its product with an exponent is exact.
inline constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;

// ln(x) of a positive, normal x, as the sum of two doubles.
//
//   Numerics: x = 2^n m, sqrt(1/2) <= m < sqrt(2), and ln(m) = 2 atanh(s), s = (m - 1) / (m + 1), by its
//             series; within 2^-58 of exact, relatively; its first part within 0.52 ULP of f64.
inline DoubleDouble logarithm(double x) {
    constexpr std::uint64_t kMantissa = (std::uint64_t{1} << 52) - 1, kOne = std::uint64_t{1023} << 52;
    constexpr std::uint64_t kSquareRootOfHalf = 0x3FE6A09E667F3BCD;
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(x) + (kOne - kSquareRootOfHalf);
    const double n = static_cast<double>(static_cast<std::int64_t>(bits >> 52) - 1023);
    const double m = std::bit_cast<double>((bits & kMantissa) + kSquareRootOfHalf);

    const double numerator = m - 1.0;  // exact, as m is between a half and two
    const DoubleDouble denominator = exact_sum(m, 1.0);
    const double s = numerator / denominator.high;
    const DoubleDouble back = exact_product(s, denominator.high);
    const double s_low = ((numerator - back.high) - back.low - s * denominator.low) / denominator.high;

    const double squared = s * s;
    double series = 0.0;
    for (int power = 25; power >= 3; power -= 2) series = series * squared + 1.0 / power;
    const DoubleDouble sum = exact_sum(n * kLn2High, 2.0 * s);
    return exact_sum(sum.high, sum.low + (n * kLn2Low + 2.0 * (s_low + s * squared * series)));
}

// base to the power of an exponent, for a positive, normal base and a result that is a normal number.
//
//   Numerics: within 1 ULP of f64 of exact, so what is rounded to f32 once is within 0.50001 ULP.
inline double power(double base, double exponent) {
    const DoubleDouble ln = logarithm(base), scaled = exact_product(exponent, ln.high);
    const double n = nearest_whole(scaled.high * 0x1.71547652b82fep+0);  // 1 / ln 2
    const DoubleDouble rest =
        exact_sum(scaled.high - n * kLn2High, scaled.low + exponent * ln.low - n * kLn2Low);
    // 1 + r + r^2/2! + ... + r^14/14!, |r| <= ln(2) / 2.
    const double r = rest.high, squares = r * r * reciprocal_factorials<2, 1, 14>(r);
    const double mantissa = 1.0 + (r + (squares + rest.low * (1.0 + r)));
    // By two powers of two, as the largest results have a mantissa below 1.
    const auto whole = static_cast<std::int64_t>(n);
    const auto two_to = [](std::int64_t k) {
        return std::bit_cast<double>(static_cast<std::uint64_t>(1023 + k) << 52);
    };
    return mantissa * two_to(whole / 2) * two_to(whole - whole / 2);
}

}  // namespace tsqp
