// What `scripts/bench_checks.py` measures: checks of products (native/field/check.h), warm and out of memory.
//
// An extension of its own: the TEE process loads no benchmark.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/instruction_sets.h"
#include "cpu/pages.h"
#include "cpu/thread_pool.h"
#include "field/check.h"

namespace py = pybind11;

namespace tsqp {
namespace {

using Clock = std::chrono::steady_clock;

volatile std::uint64_t witness = 0;  // what was read, so that it is

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

const FieldKernels& field_kernels() { return *supported_field_kernels().back(); }
const CheckKernels& check_kernels() { return *supported_check_kernels().back(); }

class Random {
  public:
    std::uint32_t word() {
        return static_cast<std::uint32_t>((state_ = state_ * kFactor + 1) >> 33) % kPrime;
    }
    float number() { return static_cast<float>(word()) * 0x1p-30f - 1.0f; }

  private:
    static constexpr std::uint64_t kFactor = 6364136223846793005;
    std::uint64_t state_ = 1;
};

// Checks of several Linears of one shape, which take turns at the same rows, as the layers of a model do.
// Before each call so many bytes of other data are read, as the other side reads its weights meanwhile; then
// the rows of x are touched, as whoever wrote them has just done.
class FieldChecks {
  public:
    FieldChecks(std::size_t outputs, std::size_t inputs, std::size_t num_vectors, std::size_t rows,
                std::size_t copies, std::size_t bytes_between)
        : weights_(outputs, inputs),
          rows_(rows),
          bytes_between_(bytes_between),
          others_(bytes_between > 0 ? kOtherBytes + bytes_between : 0, true),
          vectors_(num_vectors * outputs),
          x_(rows * inputs, true),
          out_(rows * outputs, true),
          m_(x_.size(), true),
          y_(out_.size(), true),
          scales_(rows),
          sums_(rows * num_vectors) {
        Random random;
        std::vector<float> weight(outputs * inputs);
        for (float& each : weight) each = random.number();
        weights_.set_rows(field_kernels(), 0, outputs, weight.data());
        for (std::uint32_t& word : vectors_) word = random.word();
        // Peaked, as activations are: of uniform numbers wide rows would be quantised twice.
        for (std::size_t i = 0; i < x_.size(); ++i)
            x_.data()[i] = random.number() * random.number() * random.number();
        for (std::size_t i = 0; i < y_.size(); ++i) y_.data()[i] = random.word();
        std::memset(out_.data(), 0, out_.size() * sizeof(float));
        std::memset(others_.data(), 1, others_.size());
        for (std::size_t i = 0; i < copies; ++i)
            checks_.emplace_back(check_kernels(), weights_, vectors_.data(), num_vectors);
    }

    // Seconds that begin and finish of all rows take with each copy, one after the other. `fetched`: what a
    // check reads besides its rows was asked for before, and y is where this core has written it.
    std::pair<std::vector<double>, std::vector<double>> seconds(bool fetched) {
        const py::gil_scoped_release unlocked;
        std::pair<std::vector<double>, std::vector<double>> taken;
        for (const FieldCheck& check : checks_) {
            read_others();
            if (fetched) check.fetch(), touch(y_), touch(out_);
            touch(x_);
            auto begin = Clock::now();
            check.begin(field_kernels(), check_kernels(), x_.data(), rows_, m_.data(), scales_.data(),
                        sums_.data(), nullptr);
            taken.first.push_back(seconds_since(begin));
            if (!fetched) read_others();
            begin = Clock::now();
            // What was drawn for y is no product.
            if (check.finish(check_kernels(), y_.data(), rows_, scales_.data(), sums_.data(), out_.data(),
                             nullptr))
                throw std::runtime_error("a check held that had to fail");
            taken.second.push_back(seconds_since(begin));
        }
        return taken;
    }

    // Seconds that a check takes to make, which is Ws = W^T s.
    double draw() const {
        const py::gil_scoped_release unlocked;
        const auto begin = Clock::now();
        const FieldCheck check(check_kernels(), weights_, vectors_.data(), checks_[0].num_vectors());
        return seconds_since(begin);
    }

  private:
    static constexpr std::size_t kOtherBytes = 128 << 20;

    void read_others() {
        read(others_.data() + others_at_, bytes_between_);
        others_at_ = (others_at_ + bytes_between_) % kOtherBytes;
    }
    template <class T>
    static void touch(const Pages<T>& pages) {
        read(reinterpret_cast<const unsigned char*>(pages.data()), pages.size() * sizeof(T));
    }
    static void read(const unsigned char* bytes, std::size_t size) {
        std::uint64_t sum = 0;
        for (std::size_t i = 0; i < size; i += 64) sum += bytes[i];
        witness = witness + sum;
    }

    FieldWeights weights_;
    std::size_t rows_, bytes_between_, others_at_ = 0;
    Pages<unsigned char> others_;
    std::vector<std::uint32_t> vectors_;
    Pages<float> x_, out_;
    Pages<std::uint32_t> m_, y_;
    std::vector<float> scales_;
    std::vector<std::uint32_t> sums_;
    std::vector<FieldCheck> checks_;
};

}  // namespace
}  // namespace tsqp

PYBIND11_MODULE(_field_checks, module) {
    using namespace tsqp;
    using namespace py::literals;
    module.doc() = "Checks of products, timed: native/bench/field_checks.cpp.";
    module.def("instruction_set", [] { return check_kernels().name; });
    module.def(
        "set_num_threads",
        [](std::size_t threads, std::size_t patience_us) {
            set_num_threads(threads, std::chrono::microseconds(patience_us));
        },
        "num_threads"_a, "patience_us"_a = 0);
    py::class_<FieldChecks>(module, "FieldChecks")
        .def(py::init<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>(),
             "outputs"_a, "inputs"_a, "vectors"_a, "rows"_a, "copies"_a, "bytes_between"_a = 0)
        .def("seconds", &FieldChecks::seconds, "fetched"_a = false)
        .def("draw", &FieldChecks::draw);
}
