// What Python holds of an arena: parts of it together with the mapping that they point into.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#include "border/arena_guard.h"
#include "border/layout.h"
#include "border/ring.h"

namespace tsqp {

namespace py = pybind11;

// A writable view of the arena that keeps Python's mapping alive until released.
class ArenaView {
  public:
    explicit ArenaView(const py::buffer& buffer) : info_(buffer.request(true)) {
        const auto address = reinterpret_cast<std::uintptr_t>(info_.ptr);
        if (static_cast<std::size_t>(info_.size * info_.itemsize) < kSlotsOffset)
            throw py::value_error("an arena is at least " + std::to_string(kSlotsOffset) + " bytes");
        if (address % alignof(ControlWord) != 0) throw py::value_error("the arena's mapping is not aligned");
    }

    std::byte* base() const { return static_cast<std::byte*>(info_.ptr); }
    std::size_t size_bytes() const { return static_cast<std::size_t>(info_.size * info_.itemsize); }

    // Uses words of the arena; one that is lost raises ArenaLost, whatever its zeros look like.
    template <class Use>
    auto use(Use words) const {
        try {
            const auto result = words();
            require_intact(base());
            return result;
        } catch (const PeerViolation&) {
            require_intact(base());
            throw;
        }
    }

  private:
    py::buffer_info info_;
};

// Binds a ring end or a heartbeat together with the mapping it points into.
template <typename Part>
class Held {
  public:
    template <typename Make>
    Held(const py::buffer& arena, Make make)
        : view_(std::make_shared<ArenaView>(arena)), part_(make(view_->base())) {}

    Part& operator*() {
        if (!part_) throw py::value_error("used after release()");
        return *part_;
    }
    Part* operator->() { return &**this; }

    template <class Use>
    auto use(Use words) {
        Part& part = **this;
        return view_->use([&] { return words(part); });
    }

    void release() {
        part_.reset();
        view_.reset();
    }

  protected:
    // Uses words of the arena without Python's lock.
    template <class Use>
    auto use_unlocked(Use words) {
        Part& part = **this;
        // SAFETY: another thread may call release() meanwhile; mapping and part stay until this returns.
        const std::shared_ptr<ArenaView> view = view_;
        const std::shared_ptr<Part> kept = part_;
        return view->use([&] {
            const py::gil_scoped_release released;
            return words(part);
        });
    }

  private:
    std::shared_ptr<ArenaView> view_;  // outlives part_, which points into it
    std::shared_ptr<Part> part_;
};

using HeldWriter = Held<RingWriter>;

// A ring's reading end, and how its waits ended.
class HeldReader : public Held<RingReader> {
  public:
    using Held<RingReader>::Held;

    // Waits for a record without Python's lock.
    Wait wait(std::uint64_t spin_ns, std::uint64_t yield_ns) {
        Wait how = Wait::ready;
        if (!use([](RingReader& ring) { return ring.available(); }))
            how = use_unlocked([&](RingReader& ring) { return ring.wait(spin_ns, yield_ns); });
        // Ctrl-C during the wait is raised before a record is taken; after it, the record would be lost with
        // the result.
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        return how;
    }

    // Takes the record that a wait, or a look after a sleep, has found.
    Record take(Wait how) {
        const Record record = use([](RingReader& ring) { return ring.take(); });
        ++waits_[static_cast<std::size_t>(how)];
        return record;
    }

    // By `Wait`, how many records were waited for like that.
    const std::array<std::uint64_t, 4>& waits() const { return waits_; }

  private:
    std::array<std::uint64_t, 4> waits_{};
};

inline py::bytes bytes_of(const Record& record) {
    return {reinterpret_cast<const char*>(record.data()), kRecordBytes};
}

inline Record record_of(const py::bytes& bytes) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
    if (size != static_cast<Py_ssize_t>(kRecordBytes)) throw py::value_error("a record is 64 bytes");
    Record record;
    std::memcpy(record.data(), data, kRecordBytes);
    return record;
}

}  // namespace tsqp
