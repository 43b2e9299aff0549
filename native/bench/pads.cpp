// What `scripts/bench_pads.py` measures of pads: rows drawn, and rows of integers less their pads
// (native/pads/pad_kernels.h).
//
// An extension of its own: the TEE process loads no benchmark.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pages.h"
#include "pads/pad_kernels.h"

namespace py = pybind11;

namespace tsqp {
namespace {

using Clock = std::chrono::steady_clock;

const PadKernels& kernels_named(const std::string& name) {
    for (const PadKernels* kernels : supported_pad_kernels())
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("no kernels of this machine: '" + name + "'");
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const PadKernels* kernels : supported_pad_kernels()) names.emplace_back(kernels->name);
    return names;
}

// Rows of one key. Drawn rows lie behind each other, as for a pad maker's products, and so does what is
// written of masked ones, as in a slot; the integers are one row that the last pass has just left in the
// cache, as a quantiser does.
class PadRows {
  public:
    PadRows(const std::string& kernels, std::size_t inputs, std::size_t rows)
        : kernels_(kernels_named(kernels)),
          inputs_(inputs),
          rows_(rows),
          integers_(inputs + 1),
          r_(inputs * rows, true),
          m_(inputs * rows, true) {
        if (inputs % 2 != 0) throw std::invalid_argument("inputs: expected an even number");
        std::uint8_t key[kAesKeyBytes] = {1};
        expand_key(key, schedule_);
    }

    // Seconds that all rows take, `times` times.
    double draw(std::size_t times) {
        return seconds(times, [this](std::size_t row) {
            kernels_.draw({&schedule_, row}, inputs_, r_.data() + row * inputs_);
        });
    }
    double mask(std::size_t times) {
        return seconds(times, [this](std::size_t row) {
            kernels_.mask({&schedule_, row}, {.inputs = inputs_,
                                              .integers = integers_.data(),
                                              .m = m_.data() + row * inputs_,
                                              .copy = nullptr});
        });
    }

  private:
    template <class Work>
    double seconds(std::size_t times, const Work& work) {
        const py::gil_scoped_release unlocked;
        const auto begin = Clock::now();
        for (std::size_t i = 0; i < times; ++i)
            for (std::size_t row = 0; row < rows_; ++row) work(row);
        return std::chrono::duration<double>(Clock::now() - begin).count();
    }

    const PadKernels& kernels_;
    std::size_t inputs_, rows_;
    AesSchedule schedule_;
    std::vector<std::int32_t> integers_;
    Pages<std::uint32_t> r_, m_;
};

}  // namespace
}  // namespace tsqp

PYBIND11_MODULE(_pads, module) {
    using namespace tsqp;
    using namespace py::literals;
    module.doc() = "Pads, timed: native/bench/pads.cpp.";
    module.def("kernel_names", &kernel_names);
    py::class_<PadRows>(module, "PadRows")
        .def(py::init<const std::string&, std::size_t, std::size_t>(), "kernels"_a, "inputs"_a, "rows"_a)
        .def("draw", &PadRows::draw, "times"_a)
        .def("mask", &PadRows::mask, "times"_a);
}
