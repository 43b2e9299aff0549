// The natural logarithm, the same on every machine: a C library's may differ in the last bits.
#pragma once

#include <bit>
#include <cstdint>

namespace tsqp {

// ln(x) of a positive, normal x.
//
//   Numerics: x = 2^n m, sqrt(1/2) <= m < sqrt(2), and ln(m) = 2 atanh((m - 1) / (m + 1)) by its series, in
//   f64;
//             within 4 ULP of f64 of exact where x is 2 or more, as the sampler's sums are.
inline double natural_logarithm(double x) {
    constexpr std::uint64_t kMantissa = (std::uint64_t{1} << 52) - 1, kOne = std::uint64_t{1023} << 52;
    // One that is added to the exponent here is taken back below: m lies around 1.
    constexpr std::uint64_t kSquareRootOfHalf = 0x3FE6A09E667F3BCD;
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(x) + (kOne - kSquareRootOfHalf);
    const double n = static_cast<double>(static_cast<std::int64_t>(bits >> 52) - 1023);
    const double m = std::bit_cast<double>((bits & kMantissa) + kSquareRootOfHalf);
    const double s = (m - 1.0) / (m + 1.0), squared = s * s;
    double series = 0.0;
    for (int power = 23; power >= 1; power -= 2) series = series * squared + 1.0 / power;
    // ln2 in two parts; the first has 21 bits to spare, so n * high is exact.
    constexpr double kHigh = 0x1.62e42feep-1, kLow = 0x1.a39ef35793c76p-33;
    return n * kHigh + (2.0 * s * series + n * kLow);
}

}  // namespace tsqp
