// Sums of power series whose coefficients are the reciprocals of factorials, from the smallest term on.
#pragma once

namespace tsqp {

constexpr double factorial(int n) {
    double product = 1.0;
    for (int factor = 2; factor <= n; ++factor) product *= factor;
    return product;
}
// As a double has it exactly.
inline constexpr int kLargestFactorial = 18;

// The sum over k = first, first + step, ..., last of sign(k) x^((k - first) / step) / k!, where every second
// term of sine and cosine is negative: sign(k) = -1 for k mod 4 of 2 or 3 in steps of two, else 1.
template <int first, int step, int last>
double reciprocal_factorials(double x) {
    static_assert(last <= kLargestFactorial);
    constexpr double kSign = step == 2 && first % 4 >= 2 ? -1.0 : 1.0;
    constexpr double kCoefficient = kSign / factorial(first);
    if constexpr (first + step > last)
        return kCoefficient;
    else
        return kCoefficient + x * reciprocal_factorials<first + step, step, last>(x);
}

}  // namespace tsqp
