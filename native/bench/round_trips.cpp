// The two round trips that `tsqp-shm bench latency` compares without Python: a bare cache-line ping-pong, the
// least that two processes can do, and a record through both rings, waited for as the doorbell waits.
//
// An extension of its own: the TEE process loads no benchmark.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "border/ring.h"

namespace py = pybind11;

namespace tsqp {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::uint64_t kYieldNs = 2'000'000;

// The ping-pong's words, where the arena's first slot is: each written by one side, on cache lines of its
// own.
struct Court {
    ControlWord leader, follower;
};

// Nanoseconds a trip, the mean of each sample: reading the clock takes as long as a trip, so it is read once
// a sample.
template <typename Trip>
std::vector<double> timed(std::size_t samples, std::size_t trips, const Trip& trip) {
    std::vector<double> means(samples);
    for (double& mean : means) {
        const auto begin = Clock::now();
        for (std::size_t i = 0; i < trips; ++i) trip();
        const std::chrono::duration<double, std::nano> passed = Clock::now() - begin;
        mean = passed.count() / static_cast<double>(trips);
    }
    return means;
}

class Deadline {
  public:
    explicit Deadline(std::chrono::duration<double> patience)
        : end_(Clock::now() + std::chrono::duration_cast<Clock::duration>(patience)) {}

    void check() const {
        if (Clock::now() > end_)
            throw std::runtime_error("the other side of the round trips does not answer");
    }

  private:
    Clock::time_point end_;
};

class RoundTrips {
  public:
    RoundTrips(const py::buffer& arena, bool leads, double patience_s)
        : info_(arena.request(true)), leads_(leads), patience_(patience_s) {
        if (info_.size * info_.itemsize < static_cast<py::ssize_t>(kSlotsOffset + sizeof(Court)))
            throw py::value_error("the arena has no slot for the ping-pong's words");
        auto* base = static_cast<std::byte*>(info_.ptr);
        // SAFETY: the slot is page aligned, and info_ holds the mapping.
        court_ = reinterpret_cast<Court*>(base + kSlotsOffset);
        writer_ = std::make_unique<RingWriter>(base, leads ? kSubmissionRing : kCompletionRing);
        reader_ = std::make_unique<RingReader>(base, leads ? kCompletionRing : kSubmissionRing);
    }

    std::vector<double> ping_pong(std::size_t samples, std::size_t trips) {
        const SharedWord own(leads_ ? court_->leader.value : court_->follower.value);
        const SharedWord other(leads_ ? court_->follower.value : court_->leader.value);
        const Deadline deadline(patience_);
        const auto arrive = [&] {
            for (std::uint32_t looks = 1; other.load(std::memory_order_acquire) != hits_; ++looks)
                if (looks % (1U << 16) == 0) deadline.check();
        };
        return timed(samples, trips, [&] {
            ++hits_;
            if (!leads_) arrive();
            own.store(hits_, std::memory_order_release);
            if (leads_) arrive();
        });
    }

    std::vector<double> ring(std::size_t samples, std::size_t trips, std::uint64_t spin_ns) {
        const Deadline deadline(patience_);
        Record record{};
        const auto take = [&] {
            while (reader_->wait(spin_ns, kYieldNs) == Wait::timeout) deadline.check();
            record = reader_->take();
        };
        return timed(samples, trips, [&] {
            if (!leads_) take();
            writer_->write(record);
            if (leads_) take();
        });
    }

  private:
    py::buffer_info info_;
    bool leads_;
    std::chrono::duration<double> patience_;
    Court* court_;
    std::uint64_t hits_ = 0;
    std::unique_ptr<RingWriter> writer_;
    std::unique_ptr<RingReader> reader_;
};

}  // namespace
}  // namespace tsqp

PYBIND11_MODULE(_round_trips, module) {
    using tsqp::RoundTrips;
    const auto released = py::call_guard<py::gil_scoped_release>();
    py::class_<RoundTrips>(module, "RoundTrips")
        .def(py::init<const py::buffer&, bool, double>(), py::arg("arena"), py::arg("leads"),
             py::arg("patience_s") = 20.0)
        .def("ping_pong", &RoundTrips::ping_pong, py::arg("samples"), py::arg("trips"), released)
        .def("ring", &RoundTrips::ring, py::arg("samples"), py::arg("trips"), py::arg("spin_ns"), released);
}
