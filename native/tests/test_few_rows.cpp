// The kernels for decode on a CPU device against double precision, on arrays that end before an unreadable
// page.

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "few_rows.h"
#include "guarded.h"

using namespace tsqp;

namespace {

using Bf16 = std::uint16_t;

std::mt19937 random_bits(7);

double exact(float x) { return x; }
double exact(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16); }

template <class E>
void fill(Guarded<E>& array) {
    std::normal_distribution<float> normal;
    for (E& element : array) {
        const float x = normal(random_bits);
        if constexpr (std::is_same_v<E, float>)
            element = x;
        else
            element = static_cast<Bf16>(std::bit_cast<std::uint32_t>(x) >> 16);
    }
}

// Within the rounding of the output, and of the additions in proportion to what was added.
template <class E>
void check_close(E found, double expected, double magnitude) {
    const double rounding = std::is_same_v<E, float> ? 1e-5 : 1.0 / 256;
    CHECK(std::abs(exact(found) - expected) <= rounding * std::abs(expected) + 1e-6 * magnitude);
}

template <class E>
void test_linear(const FewRowsElementKernels& kernels, std::size_t rows, std::size_t outputs,
                 std::size_t inputs) {
    Guarded<E> x(rows * inputs), weight(outputs * inputs), bias(outputs), out(rows * outputs);
    fill(x), fill(weight), fill(bias);
    const LinearArgs args{x.data(), weight.data(), bias.data(), out.data(), rows, inputs, outputs};
    const std::size_t middle = outputs / 2;
    kernels.linear(args, 0, middle);
    kernels.linear(args, middle, outputs);
    for (std::size_t row = 0; row < rows; ++row)
        for (std::size_t output = 0; output < outputs; ++output) {
            double sum = exact(bias[output]), magnitude = 1;
            for (std::size_t i = 0; i < inputs; ++i) {
                const double term = exact(x[row * inputs + i]) * exact(weight[output * inputs + i]);
                sum += term, magnitude += std::abs(term);
            }
            check_close(out[row * outputs + output], sum, magnitude);
        }
}

template <class E>
void test_decode(const FewRowsElementKernels& kernels, std::size_t heads, std::size_t dim,
                 std::size_t columns) {
    Guarded<E> query(heads * dim), keys(dim * columns), scores(heads * columns), values(columns * dim),
        context(heads * dim);
    fill(query), fill(keys), fill(values);
    kernels.decode_scores({query.data(), keys.data(), scores.data(), heads, dim, columns, columns}, 0,
                          columns / kColumnBlock);
    for (std::size_t head = 0; head < heads; ++head)
        for (std::size_t column = 0; column < columns; ++column) {
            double sum = 0, magnitude = 1;
            for (std::size_t d = 0; d < dim; ++d) {
                const double term = exact(query[head * dim + d]) * exact(keys[d * columns + column]);
                sum += term, magnitude += std::abs(term);
            }
            check_close(scores[head * columns + column], sum, magnitude);
        }
    kernels.decode_context({scores.data(), values.data(), context.data(), heads, dim, columns});
    for (std::size_t head = 0; head < heads; ++head)
        for (std::size_t d = 0; d < dim; ++d) {
            double sum = 0, magnitude = 1;
            for (std::size_t column = 0; column < columns; ++column) {
                const double term = exact(scores[head * columns + column]) * exact(values[column * dim + d]);
                sum += term, magnitude += std::abs(term);
            }
            check_close(context[head * dim + d], sum, magnitude);
        }
}

template <class E>
void test_all(const FewRowsElementKernels& kernels) {
    for (const std::size_t rows : {1, 3, 4, 8, 9})
        for (const std::size_t outputs : {1, 4, 7})
            for (const std::size_t inputs : {1, 15, 16, 17, 31, 32, 33, 97})
                test_linear<E>(kernels, rows, outputs, inputs);
    for (const std::size_t heads : {1, 3})
        for (const std::size_t dim : {2, 8, 24, 64, 80})
            for (const std::size_t columns : {64, 192}) test_decode<E>(kernels, heads, dim, columns);
}

}  // namespace

int main() {
#if defined(__x86_64__)
    std::vector<const FewRowsKernels*> tables;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kAvx2FewRows);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"))
        tables.push_back(&kAvx512Bf16FewRows);
    for (const FewRowsKernels* table : tables) {
        test_all<Bf16>(table->bf16);
        test_all<float>(table->f32);
    }
#endif
    std::puts("few rows: ok");
}
