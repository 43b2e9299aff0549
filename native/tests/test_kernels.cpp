// The scalar table against double precision, and every other table against the scalar one, bit for bit.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "border/words.h"
#include "check.h"
#include "guarded.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"

using namespace tsqp;

namespace {

using Bf16 = std::uint16_t;

// Elements that are moved; rows of whole words; halves of a head of whole words; rows of whole blocks.
constexpr std::size_t kCounts[] = {1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 97, 576, 2048};
constexpr std::size_t kWidths[] = {4, 12, 16, 20, 28, 32, 36, 64, 100, 576, 2048};
constexpr std::size_t kHalves[] = {2, 4, 6, 8, 14, 16, 18, 32, 50, 64, 1024};
constexpr std::size_t kColumns[] = {16, 32, 48, 64, 112, 576, 2048};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::mt19937 random_bits(7);

float widen(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }
float widen(float x) { return x; }

// Rounding to bf16 by comparing distances, unlike the kernels' integer trick.
Bf16 nearest_bf16(float x) {
    if (std::isnan(x)) return 0x7FC0;
    const auto low = static_cast<Bf16>(std::bit_cast<std::uint32_t>(x) >> 16);
    if (widen(low) == x) return low;
    const auto high = static_cast<Bf16>(low + 1);  // away from zero
    const double limit = std::ldexp(1.0, 128);     // where infinity would be, were it a number
    const double to_low = std::fabs(double{x} - double{widen(low)});
    const double to_high =
        std::fabs((std::isinf(widen(high)) ? std::copysign(limit, x) : double{widen(high)}) - x);
    if (to_low == to_high) return low % 2 == 0 ? low : high;
    return to_low < to_high ? low : high;
}

// One ULP of E at x.
template <class E>
double ulp(double x) {
    const int digits = sizeof(E) == 2 ? 8 : 24;
    const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
    return std::ldexp(1.0, exponent - digits + 1);
}

template <class E>
void fill(Guarded<E>& to, float scale, bool special) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (E& x : to) {
        float value = normal(random_bits);
        if (special && random_bits() % 16 == 0) {
            const std::uint32_t bits = static_cast<std::uint32_t>(random_bits());
            const float kinds[] = {
                kInfinity, -kInfinity, -0.0f, 1e-40f, 3e38f, -3e38f, std::bit_cast<float>(bits)};
            value = kinds[random_bits() % 7];
        }
        if constexpr (sizeof(E) == 2)
            x = static_cast<Bf16>(std::bit_cast<std::uint32_t>(value) >> 16);
        else
            x = value;
    }
}

template <class E>
bool same_bits(Guarded<E>& a, Guarded<E>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
}

template <class E>
void copy(Guarded<E>& from, Guarded<E>& to) {
    std::copy(from.begin(), from.end(), to.begin());
}

template <class E>
const ElementKernels& kernels(const KernelTable& table) {
    return sizeof(E) == 2 ? table.bf16 : table.f32;
}

void test_exp_is_within_its_ulp() {
    double worst = 0;
    const std::uint32_t first = std::bit_cast<std::uint32_t>(-0.0f),
                        last = std::bit_cast<std::uint32_t>(-110.0f);
    std::vector<float> in, out(1 << 16);
    for (std::uint64_t bits = first; bits <= last;) {
        in.clear();
        for (; in.size() < out.size() && bits <= last; bits += 509)
            in.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
        kScalarKernels.exp_nonpositive({in.data(), out.data()}, 0, in.size());
        for (std::size_t i = 0; i < in.size(); ++i) {
            const double exact = std::exp(double{in[i]});
            worst = std::max(worst, std::fabs(out[i] - exact) / ulp<float>(exact));
        }
    }
    std::printf("exp: at most %.3f ULP\n", worst);
    CHECK(worst <= 1);
    const float edges[] = {-kInfinity, -104.0f, -0.0f, 0.0f, kNan};
    float results[5];
    kScalarKernels.exp_nonpositive({edges, results}, 0, 5);
    CHECK(results[0] == 0 && results[1] == 0 && results[2] == 1 && results[3] == 1 && std::isnan(results[4]));
}

void test_bf16_rounding_is_to_nearest_even(const KernelTable& table) {
    const std::uint32_t tails[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    Guarded<float> from(std::size(tails) << 16);
    Guarded<Bf16> to(from.size());
    for (std::size_t i = 0; i < from.size(); ++i)
        from[i] = std::bit_cast<float>(static_cast<std::uint32_t>(i & 0xFFFF) << 16 | tails[i >> 16]);
    table.bf16.store({from.data(), to.data()}, 0, from.size());
    for (std::size_t i = 0; i < from.size(); ++i) CHECK(to[i] == nearest_bf16(from[i]));
}

template <class E>
void test_add_rms_norm(const KernelTable& table, std::size_t size, bool special) {
    const std::size_t rows = 4;
    const float eps = 1e-5f;
    Guarded<E> delta(rows * size), out(2 * size), oracle(2 * size);
    Guarded<float> residual(rows * size), residual_copy(rows * size), weight(size);
    fill(delta, 1, special), fill(residual, 3, special), fill(weight, 1, false);
    copy(residual, residual_copy);
    const std::int32_t index[] = {1, 3};
    for (const bool with_delta : {true, false}) {
        Guarded<float> before(rows * size);
        copy(residual, before);
        AddRmsNormArgs args{with_delta ? delta.data() : nullptr,
                            out.data(),
                            residual.data(),
                            index,
                            0,
                            weight.data(),
                            size,
                            eps};
        kernels<E>(table).add_rms_norm(args, 0, 2);
        AddRmsNormArgs same = args;
        same.out = oracle.data(), same.residual = residual_copy.data();
        kernels<E>(kScalarKernels).add_rms_norm(same, 0, 2);
        CHECK(same_bits(out, oracle) && same_bits(residual, residual_copy));
        if (special) continue;
        for (std::size_t i = 0; i < rows * size; ++i) {
            const bool added = with_delta && (i / size == 1 || i / size == 3);
            CHECK(residual[i] == (added ? before[i] + widen(delta[i]) : before[i]));
        }
        for (std::size_t item = 0; item < 2; ++item) {
            const float* row = residual.data() + static_cast<std::size_t>(index[item]) * size;
            double squares = 0;
            for (std::size_t i = 0; i < size; ++i) squares += double{row[i]} * row[i];
            const double inverse = 1 / std::sqrt(squares / static_cast<double>(size) + double{eps});
            for (std::size_t i = 0; i < size; ++i) {
                const double exact = row[i] * inverse * weight[i];
                const double allowed = sizeof(E) == 2 ? 1 : 5 + static_cast<double>(size) / 256;
                CHECK(std::fabs(widen(out[item * size + i]) - exact) <= allowed * ulp<E>(exact));
            }
        }
    }
}

template <class E>
void test_load_and_store(const KernelTable& table, std::size_t size) {
    // A slot ends with a whole word, private memory where it ends.
    Guarded<E> slot((size + 3) / 4 * 4), oracle(slot.size());
    Guarded<float> wide(size);
    fill(slot, 1, true);
    kernels<E>(table).load({slot.data(), wide.data()}, 0, size);
    for (std::size_t i = 0; i < size; ++i)
        CHECK(std::bit_cast<std::uint32_t>(wide[i]) == std::bit_cast<std::uint32_t>(widen(slot[i])));
    fill(wide, 1, true), copy(slot, oracle);
    kernels<E>(table).store({wide.data(), slot.data()}, 0, size);
    kernels<E>(kScalarKernels).store({wide.data(), oracle.data()}, 0, size);
    CHECK(same_bits(slot, oracle));
    const std::size_t word_elements = kWordBytes / sizeof(E);
    for (std::size_t i = size; i % word_elements != 0; ++i) CHECK(slot[i] == 0);
}

template <class E>
void test_rope(const KernelTable& table, std::size_t half, bool special) {
    // Behind the heads of a row lies something that stays.
    const std::size_t rows = 3, heads = 2, rotated = heads * 2 * half,
                      width = rotated + (half % 2 == 0 ? 4 : 0);
    Guarded<E> qk(rows * width), oracle(rows * width), before(rows * width);
    Guarded<float> cos(5 * half), sin(5 * half);
    fill(qk, 2, special), fill(cos, 1, false), fill(sin, 1, false);
    copy(qk, oracle), copy(qk, before);
    const std::int32_t positions[] = {4, 0, 2};
    Guarded<float> scratch(2 * half);
    const auto rotate = [&](const KernelTable& with, Guarded<E>& slot) {
        kernels<E>(with).rope({slot.data(), positions, cos.data(), sin.data(), heads, 2 * half, width},
                              scratch.data(), 0, rows);
    };
    rotate(table, qk), rotate(kScalarKernels, oracle);
    CHECK(same_bits(qk, oracle));
    if (special) return;
    for (std::size_t i = 0; i < qk.size(); ++i) {
        if (i % width >= rotated) {
            CHECK(widen(qk[i]) == widen(before[i]));
            continue;
        }
        const std::size_t d = i % width % (2 * half),
                          at = static_cast<std::size_t>(positions[i / width]) * half + d % half;
        const double x = widen(before[i]), partner = widen(before[d < half ? i + half : i - half]);
        const double a = x * cos[at], b = partner * sin[at], exact = d < half ? a - b : a + b;
        const double allowed = ulp<E>(exact) + 2 * ulp<float>(std::fabs(a) + std::fabs(b));
        CHECK(std::fabs(widen(qk[i]) - exact) <= allowed);
    }
}

template <class E>
void test_softmax(const KernelTable& table, std::size_t columns, bool special) {
    const std::size_t heads = 2, rows = 5;
    Guarded<E> scores(heads * rows * columns), oracle(scores.size()), before(scores.size());
    Guarded<float> scratch(columns);
    for (const std::size_t first : {std::size_t{0}, columns / 2, columns, SIZE_MAX})
        for (const std::size_t window : {std::size_t{0}, std::size_t{3}, std::size_t{16}}) {
            fill(scores, 8, special);
            copy(scores, oracle), copy(scores, before);
            kernels<E>(table).softmax({scores.data(), rows, columns, 0.5f, first, window}, scratch.data(), 0,
                                      heads * rows);
            kernels<E>(kScalarKernels)
                .softmax({oracle.data(), rows, columns, 0.5f, first, window}, scratch.data(), 0,
                         heads * rows);
            CHECK(same_bits(scores, oracle));
            if (special) continue;
            for (std::size_t row = 0; row < heads * rows; ++row) {
                const std::size_t r = row % rows, hi = std::min(std::min(first, columns) + r, columns);
                const std::size_t lo = window && hi > window ? hi - window : 0;
                const auto score = [&](std::size_t c) {
                    return 0.5 * double{widen(before[row * columns + c])};
                };
                double maximum = -INFINITY, sum = 0;
                for (std::size_t c = lo; c < hi; ++c) maximum = std::max(maximum, score(c));
                for (std::size_t c = lo; c < hi; ++c) sum += std::exp(score(c) - maximum);
                for (std::size_t c = 0; c < columns; ++c) {
                    const double exact = c < lo || c >= hi ? 0 : std::exp(score(c) - maximum) / sum;
                    const double found = widen(scores[row * columns + c]);
                    const double f32_error =
                        exact * std::ldexp(64.0 + static_cast<double>(columns) / 16, -24);
                    CHECK(std::fabs(found - exact) <= (sizeof(E) == 2 ? ulp<E>(exact) : f32_error));
                }
            }
        }
}

template <class E>
void test_silu_mul(const KernelTable& table, std::size_t size, bool special) {
    const std::size_t rows = 3;
    Guarded<E> gate_up(rows * 2 * size), out(rows * size), oracle(rows * size);
    fill(gate_up, 20, special);
    kernels<E>(table).silu_mul({gate_up.data(), out.data(), size}, 0, rows);
    kernels<E>(kScalarKernels).silu_mul({gate_up.data(), oracle.data(), size}, 0, rows);
    CHECK(same_bits(out, oracle));
    if (special) return;
    for (std::size_t i = 0; i < out.size(); ++i) {
        const double gate = widen(gate_up[i / size * 2 * size + i % size]);
        const double up = widen(gate_up[i / size * 2 * size + size + i % size]);
        const double exact = gate / (1 + std::exp(-gate)) * up;
        const double denormal = std::fabs(gate * up) * std::ldexp(1.0, -149);
        CHECK(std::fabs(widen(out[i]) - exact) <= (sizeof(E) == 2 ? 1 : 4) * ulp<E>(exact) + denormal);
    }
}

template <class E>
void test_softmax_of_special_rows(const KernelTable& table) {
    constexpr std::size_t columns = 32;
    Guarded<float> in(columns), out(columns), scratch(columns);
    Guarded<E> slot(columns);
    const auto softmax = [&](float first, float last, float others) {
        std::fill(in.begin(), in.end(), others);
        in[0] = first, in[columns - 1] = last;
        kernels<E>(table).store({in.data(), slot.data()}, 0, columns);
        kernels<E>(table).softmax({slot.data(), 1, columns, 1.0f, columns, 0}, scratch.data(), 0, 1);
        kernels<E>(table).load({slot.data(), out.data()}, 0, columns);
    };
    const auto all = [&](auto claim) { return std::all_of(out.begin(), out.end(), claim); };
    softmax(-kInfinity, -kInfinity, -kInfinity);
    CHECK(all([](float x) { return x == 0 && !std::signbit(x); }));
    softmax(kNan, -kInfinity, -kInfinity);
    CHECK(all([](float x) { return std::isnan(x); }));
    softmax(0, kNan, 1);
    CHECK(all([](float x) { return std::isnan(x); }));
    softmax(0, kInfinity, 1);
    CHECK(all([](float x) { return std::isnan(x); }));
    softmax(0, -kInfinity, -kInfinity);
    CHECK(out[0] == 1 && out[1] == 0 && out[columns - 1] == 0);
    softmax(0, -90, -kInfinity);  // e^-90 is denormal
    CHECK(out[0] == 1 && std::fabs(out[columns - 1] - std::exp(-90.0)) <= ulp<E>(0));
}

template <class E>
void test_element(const KernelTable& table) {
    for (const bool special : {false, true}) {
        for (const std::size_t width : kWidths) {
            test_add_rms_norm<E>(table, width, special);
            test_silu_mul<E>(table, width, special);
        }
        for (const std::size_t half : kHalves) test_rope<E>(table, half, special);
        for (const std::size_t columns : kColumns) test_softmax<E>(table, columns, special);
    }
    for (const std::size_t count : kCounts) test_load_and_store<E>(table, count);
    test_softmax_of_special_rows<E>(table);
}

}  // namespace

int main() {
    test_exp_is_within_its_ulp();
    for (const KernelTable* table : supported_kernels()) {
        std::printf("kernels: %s\n", table->name);
        test_bf16_rounding_is_to_nearest_even(*table);
        test_element<Bf16>(*table);
        test_element<float>(*table);
    }
}
