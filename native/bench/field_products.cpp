// What `scripts/bench_field.py` measures: the products of native/field beside a plain read of the same bytes
// and beside the instruction they are made of, in one process, on the same threads and in the same memory.
//
// An extension of its own: the TEE process loads no benchmark.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bench/peak.h"
#include "cpu/instruction_sets.h"
#include "cpu/thread_pool.h"
#include "field/linear.h"
#include "field/runs.h"

namespace py = pybind11;

namespace tsqp {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<std::uint64_t> witness{0};  // what was read or summed, so that it is

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

const FieldKernels& best_kernels() { return *supported_field_kernels().back(); }

const Peak& peak_of_best() {
#if defined(__x86_64__)
    const std::string name = best_kernels().name;
    if (name == "amx") return kTilePeak;
    if (name == "avx512vnni") return kVnniPeak;
#endif
    throw std::runtime_error(
        "the products are measured where there is VPDPBUSD or TDPBUSD; this machine has " +
        std::string(best_kernels().name));
}

// Several Linears of one shape, which together leave no cache anything of the first when the last is done.
class FieldProducts {
  public:
    FieldProducts(std::size_t outputs, std::size_t inputs, std::size_t copies) {
        peak_of_best();
        std::vector<std::uint16_t> weight(outputs * inputs);
        std::uint32_t state = 1;
        for (std::uint16_t& bits : weight) {
            state = state * 1664525 + 1013904223;
            bits = static_cast<std::uint16_t>((state >> 16 & 0x80FF) | 0x3F00);  // +-[0.5, 2)
        }
        for (std::size_t i = 0; i < copies; ++i) {
            linears_.emplace_back(outputs, inputs);
            linears_.back().set_rows(best_kernels(), 0, outputs, weight.data());
        }
    }

    std::size_t num_bytes() const {
        return linears_.size() * linears_[0].num_panels() * linears_[0].panel_bytes();
    }

    // Seconds that rows of so many digits take with each copy, one after the other, run by run.
    std::vector<double> products(std::size_t rows, std::size_t digits) {
        const FieldWeights& first = linears_[0];
        const std::size_t run_rows = blocks_of_a_run(first.depth(), digits) * kBlockRows;
        fill_blocks(std::min(rows, run_rows), digits);
        out_.resize(std::min(rows, run_rows) * first.outputs());
        const py::gil_scoped_release unlocked;
        std::vector<double> seconds;
        for (const FieldWeights& linear : linears_)
            for (std::size_t row = 0; row < rows; row += run_rows) {
                const std::size_t num_blocks = set_rows(std::min(run_rows, rows - row));
                const auto begin = Clock::now();
                multiply_blocks(best_kernels(), linear, digit_rows_, num_blocks, out_.data());
                seconds.push_back(seconds_since(begin));
            }
        return seconds;
    }

    // Seconds that rows of floats take with each copy: quantised, multiplied and made results.
    std::vector<double> whole(std::size_t rows) {
        const FieldWeights& first = linears_[0];
        std::vector<float> x(rows * first.inputs());
        std::uint32_t state = 7;
        for (float& value : x) {
            state = state * 1664525 + 1013904223;
            value = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-28f;
        }
        out_.resize(rows * first.outputs());
        const py::gil_scoped_release unlocked;
        return for_each([&](const FieldWeights& linear) {
            apply_linear(best_kernels(), linear, x.data(), rows, out_.data());
        });
    }

    // Seconds that a plain read of each copy takes, shared out evenly among the threads.
    std::vector<double> read() const {
        const py::gil_scoped_release unlocked;
        return for_each([](const FieldWeights& linear) {
            const std::size_t lines = linear.panel_bytes() * linear.num_panels() / 256;
            const std::size_t parts = kPartsPerThread * get_num_threads();
            parallel_rows(lines, (lines - 1) / parts + 1, get_num_threads(),
                          [&](std::size_t, std::size_t begin, std::size_t end) {
                              witness += read_lines(linear.panel(0) + begin * 256, (end - begin) * 256);
                          });
        });
    }

  private:
    static constexpr std::size_t kPartsPerThread = 3;

    template <class Body>
    std::vector<double> for_each(const Body& body) const {
        std::vector<double> seconds;
        for (const FieldWeights& linear : linears_) {
            const auto begin = Clock::now();
            body(linear);
            seconds.push_back(seconds_since(begin));
        }
        return seconds;
    }

    void fill_blocks(std::size_t rows, std::size_t digits) {
        const std::size_t num_blocks = blocks_of_rows(rows);
        digit_rows_.reserve(num_blocks, linears_[0].depth(), digits, digits);
        for (std::size_t i = 0; i < num_blocks; ++i) {
            DigitBlock& block = digit_rows_.block(i);
            for (IntegerRow& row : block.row) row = {.digits = digits, .scale = 1.0f, .is_narrow = true};
            std::uint8_t* const bytes = digit_rows_.digits(i);
            for (std::size_t at = 0; at < kBlockRows * digits * digit_rows_.depth(); ++at)
                bytes[at] = static_cast<std::uint8_t>(at * 37);
        }
    }

    // Lets the blocks hold so many rows; how many blocks these are.
    std::size_t set_rows(std::size_t rows) {
        const std::size_t num_blocks = blocks_of_rows(rows);
        for (std::size_t i = 0; i < num_blocks; ++i)
            digit_rows_.begin_block(i, std::min(kBlockRows, rows - i * kBlockRows));
        return num_blocks;
    }

    std::vector<FieldWeights> linears_;
    DigitRows digit_rows_;
    std::vector<float> out_;
};

// Multiplications a second of all threads, in registers.
double peak(std::uint64_t steps) {
    const Peak& best = peak_of_best();
    const std::size_t threads = get_num_threads();
    const py::gil_scoped_release unlocked;
    const auto begin = Clock::now();
    parallel_rows(16 * threads, 1, threads, [&](std::size_t, std::size_t first, std::size_t past) {
        for (std::size_t i = first; i < past; ++i) witness += best.work(steps);
    });
    return static_cast<double>(16 * threads * steps * best.multiplications) / seconds_since(begin);
}

}  // namespace
}  // namespace tsqp

PYBIND11_MODULE(_field_products, module) {
    using namespace tsqp;
    using namespace py::literals;
    module.doc() =
        "The products of native/field, a plain read and the instruction's peak: "
        "native/bench/field_products.cpp.";
    module.def("instruction_set", [] { return best_kernels().name; });
    module.def(
        "set_num_threads",
        [](std::size_t threads, std::size_t patience_us) {
            set_num_threads(threads, std::chrono::microseconds(patience_us));
        },
        "num_threads"_a, "patience_us"_a = 0);
    module.def("peak", peak, "steps"_a);
    py::class_<FieldProducts>(module, "FieldProducts")
        .def(py::init<std::size_t, std::size_t, std::size_t>(), "outputs"_a, "inputs"_a, "copies"_a)
        .def_property_readonly("num_bytes", &FieldProducts::num_bytes)
        .def("products", &FieldProducts::products, "rows"_a, "digits"_a)
        .def("whole", &FieldProducts::whole, "rows"_a)
        .def("read", &FieldProducts::read);
}
