#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cerrno>
#include <chrono>
#include <memory>
#include <string>

#include "bindings.h"
#include "border/arena_guard.h"
#include "border/heartbeat.h"
#include "border/held_arena.h"
#include "border/ring.h"

namespace tsqp {
namespace {

using HeldHeartbeat = Held<Heartbeat>;

// In the order of `Wait`.
constexpr const char* kWaitNames[] = {"ready", "spun", "yielded", "parked"};

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
    const Record record = record_of(bytes);
    return writer.use([&](RingWriter& ring) { return ring.write(record); });
}

// Publishes a submission's completion, which repeats it; see protocol.py.
bool write_completion(HeldWriter& writer, const py::bytes& submission, std::uint32_t status,
                      std::uint64_t busy_ns, std::uint64_t value) {
    Record record = record_of(submission);
    record[kStatusWord] = status;
    record[kBusyWord] = busy_ns;
    record[kValueWord] = value;
    return writer.use([&](RingWriter& ring) { return ring.write(record); });
}

py::object read_record(HeldReader& reader, std::uint64_t spin_ns, std::uint64_t yield_ns) {
    const Wait how = reader.wait(spin_ns, yield_ns);
    if (how == Wait::timeout) return py::none();
    return bytes_of(reader.take(how));
}

// The record that ended a sleep, or kept this side from it.
py::object read_parked(HeldReader& reader) {
    if (!reader.use([](RingReader& ring) { return ring.available(); })) return py::none();
    return bytes_of(reader.take(Wait::parked));
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
    layout["secret_offset_bytes"] = kSecretOffset;
    layout["secret_bytes"] = kSecretBytes;
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
    layout["dtype_u32"] = static_cast<std::uint32_t>(Dtype::u32);
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
        .def("renew", &ArenaGuard::renew)
        .def("release", &ArenaGuard::release);

    py::class_<HeldWriter, std::shared_ptr<HeldWriter>>(module, "RingWriter")
        .def(py::init([](const py::buffer& arena, const std::string& ring) {
                 const RingOffsets& at = ring_named(ring);
                 return HeldWriter(arena,
                                   [&](std::byte* base) { return std::make_unique<RingWriter>(base, at); });
             }),
             py::arg("arena"), py::arg("ring"))
        .def("write", &write_record, py::arg("record"))
        .def("complete", &write_completion, py::arg("submission"), py::arg("status"), py::arg("busy_ns"),
             py::arg("value"))
        .def("release", &HeldWriter::release);

    py::class_<HeldReader, std::shared_ptr<HeldReader>>(module, "RingReader")
        .def(py::init([](const py::buffer& arena, const std::string& ring) {
                 const RingOffsets& at = ring_named(ring);
                 return HeldReader(arena,
                                   [&](std::byte* base) { return std::make_unique<RingReader>(base, at); });
             }),
             py::arg("arena"), py::arg("ring"))
        .def("read", &read_record, py::arg("spin_ns"), py::arg("yield_ns"))
        .def("read_parked", &read_parked)
        .def("waits",
             [](const HeldReader& reader) {
                 py::dict waits;
                 const auto& counts = reader.waits();
                 for (std::size_t how = 0; how < counts.size(); ++how) waits[kWaitNames[how]] = counts[how];
                 return waits;
             })
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
        [](const py::buffer& memory) {
            const py::buffer_info info = memory.request(true);
            return mlock(info.ptr, static_cast<std::size_t>(info.size * info.itemsize)) == 0 ? 0 : errno;
        },
        py::arg("memory"));
}

}  // namespace tsqp
