// Checks what the elementary functions are asked for, then computes it.

#include <pybind11/numpy.h>

#include <cmath>
#include <limits>

#include "bindings.h"
#include "cpu/thread_pool.h"
#include "elementary/power.h"
#include "elementary/rope_tables.h"
#include "elementary/trigonometry.h"
#include "kernels/array_arguments.h"

namespace tsqp {
namespace {

py::tuple make_rope_tables(const py::array& inverse_frequencies, Index num_positions, float scale) {
    constexpr Index kMostPositions = 1 << 24;  // above, f32 has not every whole number
    const auto positions = not_negative("num_positions", num_positions);
    if (num_positions > kMostPositions)
        throw py::value_error("num_positions: expected at most " + std::to_string(kMostPositions));
    const float* frequencies = data_of<const float>(inverse_frequencies, "inverse_frequencies", {-1});
    const Index half_dim = inverse_frequencies.shape(0);
    for (Index pair = 0; pair < half_dim; ++pair)
        // Not so for NaN either.
        if (!(std::fabs(frequencies[pair]) * static_cast<float>(num_positions) <= kLargestAngle))
            throw py::value_error("inverse_frequencies[" + std::to_string(pair) +
                                  "]: expected angles of 2^40 at most");
    py::array_t<float> cosines({num_positions, half_dim}), sines({num_positions, half_dim});
    const RopeTablesArgs args{frequencies, static_cast<std::size_t>(half_dim), scale, cosines.mutable_data(),
                              sines.mutable_data()};
    {
        const py::gil_scoped_release unlocked;
        parallel_rows(positions, 64, get_num_threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
            rope_tables(args, begin, end);
        });
    }
    return py::make_tuple(cosines, sines);
}

bool is_positive_normal(double x) {
    return x >= std::numeric_limits<double>::min() && x <= std::numeric_limits<double>::max();
}

double checked_logarithm(double x) {
    if (!is_positive_normal(x)) throw py::value_error("x: expected a positive, normal number");
    return logarithm(x).high;
}

double checked_power(double base, double exponent) {
    constexpr double kLargestLogarithm = 708.0;  // of a normal result, either way
    if (!is_positive_normal(base)) throw py::value_error("base: expected a positive, normal number");
    if (!(std::fabs(exponent * logarithm(base).high) <= kLargestLogarithm))
        throw py::value_error("exponent: expected a result between 1e-307 and 1e307");
    return power(base, exponent);
}

}  // namespace

void bind_elementary(py::module_& module) {
    using namespace py::literals;
    module.def("rope_tables", make_rope_tables, "inverse_frequencies"_a, "num_positions"_a, "scale"_a);
    module.def("logarithm", checked_logarithm, "x"_a);
    module.def("power", checked_power, "base"_a, "exponent"_a);
}

}  // namespace tsqp
