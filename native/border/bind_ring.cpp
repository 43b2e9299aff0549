#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>

#include "bindings.h"
#include "border/arena_guard.h"
#include "border/heartbeat.h"
#include "border/ring.h"

namespace py = pybind11;

namespace tsqp {
namespace {

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
        : view_(std::make_unique<ArenaView>(arena)), part_(make(view_->base())) {}

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

  private:
    std::unique_ptr<ArenaView> view_;  // outlives part_, which points into it
    std::unique_ptr<Part> part_;
};

using HeldWriter = Held<RingWriter>;
using HeldReader = Held<RingReader>;
using HeldHeartbeat = Held<Heartbeat>;

const RingOffsets& ring_named(const std::string& name) {
    if (name == "submission") return kSubmissionRing;
    if (name == "completion") return kCompletionRing;
    throw py::value_error("a ring is \"submission\" or \"completion\", not \"" + name + "\"");
}

std::size_t heartbeat_offset(const std::string& role) {
    if (role == "tee") return kControlOffset + offsetof(Control, tee_heartbeat);
    if (role == "gpu") return kControlOffset + offsetof(Control, gpu_heartbeat);
    throw py::value_error("a role is \"tee\" or \"gpu\", not \"" + role + "\"");
}

std::uint64_t* word_at(std::byte* base, std::size_t offset) {
    return reinterpret_cast<std::uint64_t*>(base + offset);
}

bool write_record(HeldWriter& writer, const py::bytes& bytes) {
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
    if (size != static_cast<Py_ssize_t>(kRecordBytes)) throw py::value_error("a record is 64 bytes");
    Record record;
    std::memcpy(record.data(), data, kRecordBytes);
    return writer.use([&](RingWriter& ring) { return ring.write(record); });
}

py::tuple read_record(HeldReader& held, std::uint64_t spin_ns, std::uint64_t yield_ns) {
    const Wait how = held.use([&](RingReader& reader) {
        if (reader.available()) return Wait::ready;
        const py::gil_scoped_release released;
        return reader.wait(spin_ns, yield_ns);
    });
    // Ctrl-C during the wait is raised before a record is taken; after it, the record would be lost with the
    // result.
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (how == Wait::timeout) return py::make_tuple(static_cast<int>(how), py::none());
    const Record record = held.use([](RingReader& reader) { return reader.take(); });
    return py::make_tuple(static_cast<int>(how),
                          py::bytes(reinterpret_cast<const char*>(record.data()), kRecordBytes));
}

void raise_protocol_error(const char* field, const std::string& expected, const py::object& found) {
    const py::object type = py::module_::import("tsqp_shm.errors").attr("ProtocolError");
    const py::object error = type(field, expected, found);
    PyErr_SetObject(type.ptr(), error.ptr());
}

void bind_layout(py::module_& module) {
    py::dict layout;
    layout["magic"] = kMagic;
    layout["version"] = kLayoutVersion;
    layout["page_bytes"] = kPageBytes;
    layout["record_bytes"] = kRecordBytes;
    layout["ring_depth"] = kRingDepth;
    layout["header_magic_offset_bytes"] = offsetof(Header, magic);
    layout["header_version_offset_bytes"] = offsetof(Header, version);
    layout["header_epoch_offset_bytes"] = offsetof(Header, epoch);
    layout["header_total_bytes_offset_bytes"] = offsetof(Header, total_bytes);
    layout["header_digest_offset_bytes"] = offsetof(Header, digest);
    layout["header_bytes"] = sizeof(Header);
    layout["invitation_length_offset_bytes"] = kInvitationLengthOffset;
    layout["invitation_offset_bytes"] = kInvitationOffset;
    layout["max_invitation_bytes"] = kMaxInvitationBytes;
    layout["control_offset_bytes"] = kControlOffset;
    layout["progress_offset_bytes"] = kProgressOffset;
    layout["progress_bytes"] = kProgressBytes;
    layout["submission_ring_offset_bytes"] = kSubmissionRingOffset;
    layout["completion_ring_offset_bytes"] = kCompletionRingOffset;
    layout["slots_offset_bytes"] = kSlotsOffset;
    layout["tee_heartbeat_offset_bytes"] = heartbeat_offset("tee");
    layout["gpu_heartbeat_offset_bytes"] = heartbeat_offset("gpu");
    layout["dtype_bf16"] = static_cast<std::uint32_t>(Dtype::bf16);
    layout["dtype_f32"] = static_cast<std::uint32_t>(Dtype::f32);
    layout["dtype_i32"] = static_cast<std::uint32_t>(Dtype::i32);
    module.attr("LAYOUT") = layout;
}

}  // namespace

void bind_ring(py::module_& module) {
    bind_layout(module);

    // Either is the package's own ProtocolError: field, what was allowed, what was found.
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const PeerViolation& error) {
            raise_protocol_error(error.field,
                                 std::to_string(error.lowest) + " to " + std::to_string(error.highest),
                                 py::int_(error.found));
        } catch (const ArenaLost& error) {
            raise_protocol_error("arena", std::to_string(error.size_bytes) + " bytes of shared memory",
                                 py::str("pages that were taken away: another process cut the object short"));
        }
    });

    // SAFETY: does not hold the mapping; the Arena releases it before it unmaps.
    py::class_<ArenaGuard>(module, "ArenaGuard")
        .def(py::init([](const py::buffer& arena) {
                 const ArenaView view(arena);
                 return std::make_unique<ArenaGuard>(view.base(), view.size_bytes());
             }),
             py::arg("arena"))
        .def("release", &ArenaGuard::release);

    py::class_<HeldWriter>(module, "RingWriter")
        .def(py::init([](const py::buffer& arena, const std::string& ring) {
                 const RingOffsets& at = ring_named(ring);
                 return HeldWriter(arena,
                                   [&](std::byte* base) { return std::make_unique<RingWriter>(base, at); });
             }),
             py::arg("arena"), py::arg("ring"))
        .def("write", &write_record, py::arg("record"))
        .def("release", &HeldWriter::release);

    py::class_<HeldReader>(module, "RingReader")
        .def(py::init([](const py::buffer& arena, const std::string& ring) {
                 const RingOffsets& at = ring_named(ring);
                 return HeldReader(arena,
                                   [&](std::byte* base) { return std::make_unique<RingReader>(base, at); });
             }),
             py::arg("arena"), py::arg("ring"))
        .def("read", &read_record, py::arg("spin_ns"), py::arg("yield_ns"))
        .def("available",
             [](HeldReader& held) { return held.use([](RingReader& reader) { return reader.available(); }); })
        .def("park",
             [](HeldReader& held) { return held.use([](RingReader& reader) { return reader.park(); }); })
        .def("unpark", [](HeldReader& reader) { reader->unpark(); })
        .def("release", &HeldReader::release);

    py::class_<HeldHeartbeat>(module, "Heartbeat")
        .def(py::init([](const py::buffer& arena, const std::string& role, int interval_ms) {
                 const std::size_t offset = heartbeat_offset(role);
                 return HeldHeartbeat(arena, [&](std::byte* base) {
                     return std::make_unique<Heartbeat>(word_at(base, offset),
                                                        std::chrono::milliseconds(interval_ms));
                 });
             }),
             py::arg("arena"), py::arg("role"), py::arg("interval_ms"))
        .def("release", &HeldHeartbeat::release);

    module.def(
        "load_word",
        [](const py::buffer& arena, std::size_t offset_bytes) {
            const ArenaView view(arena);
            if (offset_bytes % 8 != 0 || offset_bytes > kSlotsOffset - 8)
                throw py::index_error("not a fixed word");
            // UNTRUSTED: one whole word, copied here; whoever asks for it compares it and concludes nothing
            // else.
            return view.use([&] {
                return SharedWord(*word_at(view.base(), offset_bytes)).load(std::memory_order_acquire);
            });
        },
        py::arg("arena"), py::arg("offset_bytes"));
    module.def(
        "store_word",
        [](const py::buffer& arena, std::size_t offset_bytes, std::uint64_t value) {
            const ArenaView view(arena);
            if (offset_bytes % 8 != 0 || offset_bytes > kSlotsOffset - 8)
                throw py::index_error("not a fixed word");
            SharedWord(*word_at(view.base(), offset_bytes)).store(value, std::memory_order_release);
        },
        py::arg("arena"), py::arg("offset_bytes"), py::arg("value"));
    module.def(
        "lock_memory",
        [](const py::buffer& arena) {
            const ArenaView view(arena);
            return mlock(view.base(), view.size_bytes()) == 0 ? 0 : errno;
        },
        py::arg("arena"));
}

}  // namespace tsqp
