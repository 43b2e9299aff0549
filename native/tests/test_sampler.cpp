// The sampler's own logarithm against the C library's, and its passes over a row against double precision and
// each other. What the sampler does with them is tested from Python, against numpy.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "guarded.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"
#include "sampler/logarithm.h"

using namespace tsqp;

namespace {

std::mt19937_64 random_bits(11);

void test_logarithm() {
    std::uniform_real_distribution<double> exponent(0.0, 60.0);
    double worst = 0;
    for (int i = 0; i < 200'000; ++i) {
        const double x = std::exp2(exponent(random_bits));
        const long double exact = std::log(static_cast<long double>(x));
        const double ulp = std::ldexp(1.0, std::max(std::ilogb(static_cast<double>(exact)), -10) - 52);
        worst = std::max(worst, static_cast<double>(std::fabs(natural_logarithm(x) - exact)) / ulp);
    }
    std::printf("logarithm: %.2f ULP at most, for 1 to 2^60\n", worst);
    CHECK(worst < 4);
    CHECK(natural_logarithm(1.0) == 0.0);
}

void test_maxima_and_weights() {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (const std::size_t size : {1u, 15u, 16u, 63u, 64u, 65u, 1000u}) {
        Guarded<float> logits(size);
        std::normal_distribution<float> normal(0.0f, 8.0f);
        for (float& x : logits) x = normal(random_bits);
        const float maximum = *std::max_element(logits.begin(), logits.end());
        for (const KernelTable* table : supported_kernels()) {
            Guarded<float> maxima((size + kLogitBlock - 1) / kLogitBlock);
            CHECK(table->logit_maxima({logits.data(), size, maxima.data()}));
            for (std::size_t block = 0; block < maxima.size(); ++block) {
                const float* first = logits.data() + block * kLogitBlock;
                const float* last = logits.data() + std::min(size, (block + 1) * kLogitBlock);
                CHECK(maxima.data()[block] == *std::max_element(first, last));
            }
            Guarded<std::uint32_t> weights(size), oracle(size);
            table->logit_weights({logits.data(), maximum, 0.7f, weights.data()}, 0, size);
            kScalarKernels.logit_weights({logits.data(), maximum, 0.7f, oracle.data()}, 0, size);
            for (std::size_t i = 0; i < size; ++i) {
                CHECK(weights.data()[i] == oracle.data()[i]);
                const float distance = (logits.data()[i] - maximum) * 0.7f;
                const double exact = std::exp(static_cast<double>(distance)) * kLargestWeight;
                CHECK(std::fabs(weights.data()[i] - exact) <= 0.5 + exact * 0x1p-22);
            }
            for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
                const std::size_t at = random_bits() % size;
                const float good = std::exchange(logits.data()[at], bad);
                CHECK(!table->logit_maxima({logits.data(), size, maxima.data()}));
                logits.data()[at] = good;
            }
        }
    }
}

}  // namespace

int main() {
    test_logarithm();
    test_maxima_and_weights();
    return 0;
}
