#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "border/held_arena.h"
#include "border/loans.h"
#include "border/submissions.h"
#include "border/tallies.h"

namespace tsqp {
namespace {

// The clock of Python's time.perf_counter_ns, and of the trace.
std::uint64_t now_ns() {
    return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                          std::chrono::steady_clock::now().time_since_epoch())
                                          .count());
}

// Submissions with what they keep in Python, and the rings that carry them.
//
// Where there are rings, a record is written here, and completions are read here; Python is called to wake a
// reader that is parked, and called for where nothing comes. Where there are none, Python passes each record.
class HeldSubmissions {
  public:
    using Slot = std::tuple<std::uint64_t, std::uint64_t, bool>;

    HeldSubmissions(std::uint64_t epoch, const std::vector<Slot>& slots, std::shared_ptr<Loans> loans,
                    std::shared_ptr<Tallies> tallies, py::function deliver,
                    std::shared_ptr<HeldWriter> writer, std::shared_ptr<HeldReader> reader,
                    std::uint64_t spin_ns, std::uint64_t yield_ns)
        : loans_(std::move(loans)),
          tallies_(std::move(tallies)),
          submissions_(epoch, lendable(slots), *loans_, *tallies_),
          deliver_(std::move(deliver)),
          writer_(std::move(writer)),
          reader_(std::move(reader)),
          spin_ns_(spin_ns),
          yield_ns_(yield_ns) {}

    // Returns the sequence number; 0: as many are in flight as the ring holds, so wait for the oldest first.
    std::uint64_t submit(std::size_t operation, std::uint16_t opcode, std::uint16_t target,
                         std::uint16_t in_slot, std::uint16_t out_slot, std::uint32_t first_row,
                         std::uint32_t rows, std::uint32_t first_segment, std::uint32_t num_segments,
                         std::uint64_t tile_bytes) {
        if (submissions_.is_full()) return 0;
        const Record& record = submissions_.submit({operation, opcode, target, in_slot, out_slot, first_row,
                                                    rows, first_segment, num_segments, tile_bytes},
                                                   now_ns());
        const auto is_delivered = [&](RingWriter& ring) { return !ring.write(record); };
        if (!writer_ || !writer_->use(is_delivered)) deliver_(bytes_of(record));
        return submissions_.submitted();
    }

    // Completes what comes, up to a sequence number. False: the next one will take longer, or passes by
    // Python, or it is time for Python to look at what else there is (`look_at`).
    bool wait(std::uint64_t sequence) {
        if (sequence > submissions_.submitted())
            throw py::value_error("nothing was submitted under that number");
        while (submissions_.completed() < sequence) {
            const std::uint64_t now = now_ns();
            if (!reader_ || now >= look_at_ns_) return false;
            const bool is_there = reader_->use([](RingReader& ring) { return ring.available(); });
            if (submissions_.begin_wait(now) > 0 && !is_there) return false;
            const Wait how = reader_->wait(spin_ns_, yield_ns_);
            if (how == Wait::timeout) return false;
            submissions_.complete(reader_->take(how), now_ns());
        }
        return true;
    }

    // From when on `wait` leaves the next completion to Python, however fast completions come.
    void look_at(std::uint64_t at_ns) { look_at_ns_ = at_ns; }

    std::uint64_t nap_ns() { return submissions_.begin_wait(now_ns()); }
    void napped() { submissions_.napped(now_ns()); }
    void complete(const py::bytes& record) {
        submissions_.begin_wait(now_ns());
        submissions_.complete(record_of(record), now_ns());
    }

    std::uint64_t submitted() const { return submissions_.submitted(); }
    std::uint64_t completed() const { return submissions_.completed(); }
    py::tuple outcome() const { return py::make_tuple(submissions_.busy_ns(), submissions_.value()); }

    // Of the oldest in flight: its operation's name, and the slot that it writes, or else reads.
    py::tuple oldest() const {
        const Submissions::InFlight& oldest = submissions_.oldest();
        const std::size_t slot = oldest.out_slot != kNoSlot ? oldest.out_slot : oldest.in_slot;
        return py::make_tuple(tallies_->operations[oldest.operation].name, slot);
    }

  private:
    static std::vector<LendableSlot> lendable(const std::vector<Slot>& slots) {
        std::vector<LendableSlot> all;
        for (const auto& [num_rows, row_bytes, holds_tiles] : slots)
            all.push_back({num_rows, row_bytes, holds_tiles});
        return all;
    }

    std::shared_ptr<Loans> loans_;
    std::shared_ptr<Tallies> tallies_;
    Submissions submissions_;
    py::function deliver_;
    std::shared_ptr<HeldWriter> writer_;
    std::shared_ptr<HeldReader> reader_;
    std::uint64_t spin_ns_, yield_ns_;
    std::uint64_t look_at_ns_ = 0;
};

py::list operations_of(const Tallies& tallies) {
    py::list rows;
    for (const OperationTally& tally : tallies.operations)
        if (tally.calls > 0) rows.append(py::make_tuple(tally.name, tally.calls, tally.total_ns));
    return rows;
}

}  // namespace

void bind_submissions(py::module_& module) {
    using namespace py::literals;

    static py::handle unexpected =
        py::exception<UnexpectedCompletion>(module, "UnexpectedCompletion").release();
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const UnexpectedCompletion& error) {
            const py::tuple records = py::make_tuple(bytes_of(error.submitted), bytes_of(error.completed));
            PyErr_SetObject(unexpected.ptr(), records.ptr());
        }
    });

    py::class_<Loans, std::shared_ptr<Loans>>(module, "Loans")
        .def(py::init<>())
        .def("lend", &Loans::lend, "slot"_a, "first_row"_a, "rows"_a, "operation"_a)
        .def("take_back", &Loans::take_back)
        .def_property_readonly("count", &Loans::count)
        .def("holder", &Loans::holder, "slot"_a, "first_row"_a, "end_row"_a);

    py::class_<Tallies, std::shared_ptr<Tallies>>(module, "Tallies")
        .def(py::init<>())
        .def_readonly("doorbells", &Tallies::doorbells)
        .def_readonly("bytes_to_gpu", &Tallies::bytes_to_gpu)
        .def_readonly("bytes_to_tee", &Tallies::bytes_to_tee)
        .def_readonly("waiting_ns", &Tallies::waiting_ns)
        .def_readonly("round_trips_by_bits", &Tallies::round_trips_by_bits)
        .def_readonly("round_trips_ns", &Tallies::round_trips_ns)
        .def("number_of", &Tallies::number_of, "operation"_a)
        .def("operations", &operations_of)
        .def("newest_round_trips", &Tallies::newest_round_trips, "most"_a = kRoundTripSamples);

    py::class_<HeldSubmissions>(module, "Submissions")
        .def(py::init<std::uint64_t, const std::vector<HeldSubmissions::Slot>&, std::shared_ptr<Loans>,
                      std::shared_ptr<Tallies>, py::function, std::shared_ptr<HeldWriter>,
                      std::shared_ptr<HeldReader>, std::uint64_t, std::uint64_t>(),
             "epoch"_a, "slots"_a, "loans"_a, "tallies"_a, "deliver"_a, "writer"_a = nullptr,
             "reader"_a = nullptr, "spin_ns"_a = 0, "yield_ns"_a = 0)
        .def("submit", &HeldSubmissions::submit)
        .def("wait", &HeldSubmissions::wait, "sequence"_a)
        .def("look_at", &HeldSubmissions::look_at, "at_ns"_a)
        .def("nap_ns", &HeldSubmissions::nap_ns)
        .def("napped", &HeldSubmissions::napped)
        .def("complete", &HeldSubmissions::complete, "record"_a)
        .def_property_readonly("submitted", &HeldSubmissions::submitted)
        .def_property_readonly("completed", &HeldSubmissions::completed)
        .def("outcome", &HeldSubmissions::outcome)
        .def("oldest", &HeldSubmissions::oldest);
}

}  // namespace tsqp
