// `_native.PadKeys`, of which no key and no pad comes to Python, and what is tested of it with keys that are
// known.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "bindings.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"
#include "pads/hkdf.h"
#include "pads/keys.h"
#include "pads/pad_kernels.h"

namespace tsqp {
namespace {

const PadKernels& active_pad_kernels() { return pad_kernels_of(active_kernels().name); }

const std::uint8_t* bytes_of(std::string_view bytes) {
    return reinterpret_cast<const std::uint8_t*>(bytes.data());
}

const std::uint8_t* of_size(std::string_view bytes, const char* name, std::size_t size) {
    if (bytes.size() != size)
        throw py::value_error(std::string(name) + ": got " + std::to_string(bytes.size()) +
                              " bytes, expected " + std::to_string(size));
    return bytes_of(bytes);
}

std::shared_ptr<PadKeys> make_keys(const py::bytes& session, const py::bytes& model_digest,
                                   std::uint64_t key_epoch, Index num_linears,
                                   const std::optional<py::bytes>& seed) {
    const std::uint8_t* const bytes = seed ? of_size(*seed, "seed", 32) : nullptr;
    try {
        return std::make_shared<PadKeys>(std::string_view(session), std::string_view(model_digest), key_epoch,
                                         not_negative("num_linears", num_linears), bytes);
    } catch (const std::system_error& error) {
        // An OSError, of the class that goes with its number.
        const py::object raised =
            py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code().value(), error.what());
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
        throw py::error_already_set();
    }
}

py::array_t<std::uint32_t> draw_pads(const py::bytes& key, std::uint64_t row, Index inputs) {
    AesSchedule schedule;
    expand_key(of_size(key, "key", kAesKeyBytes), schedule);
    py::array_t<std::uint32_t> r(static_cast<Index>(not_negative("inputs", inputs)));
    active_pad_kernels().draw({&schedule, row}, static_cast<std::size_t>(inputs), r.mutable_data());
    return r;
}

py::array_t<std::uint32_t> pads_of_stream(const py::bytes& stream, Index inputs) {
    const std::string_view bytes(stream);
    const std::size_t count = not_negative("inputs", inputs), words = bytes.size() / sizeof(std::uint32_t);
    std::vector<std::uint32_t> given(words + kStreamGroup);
    std::memcpy(given.data(), bytes.data(), words * sizeof(std::uint32_t));
    std::size_t accepted = 0;
    for (std::size_t i = 0; i < words; ++i) accepted += (given[i] & kPrime) != kPrime;
    if (count > words || accepted < count)
        throw py::value_error("stream: " + std::to_string(accepted) +
                              " words other than 2^31 - 1, expected " + std::to_string(count));
    py::array_t<std::uint32_t> r(inputs);
    active_pad_kernels().draw_given({reinterpret_cast<const std::uint8_t*>(given.data())}, count,
                                    r.mutable_data());
    return r;
}

py::bytes hkdf_sha256(const py::bytes& salt, const py::bytes& input, const py::bytes& info, Index size) {
    HashWork work;
    std::uint8_t root[kDigestBytes];
    hkdf_extract(work, std::string_view(salt), std::string_view(input), root);
    if (not_negative("size", size) > kMaxExpandedBytes)
        throw py::value_error("size: got " + std::to_string(size) + ", expected at most " +
                              std::to_string(kMaxExpandedBytes));
    std::string out(static_cast<std::size_t>(size), '\0');
    hkdf_expand(work, root, std::string_view(info), reinterpret_cast<std::uint8_t*>(out.data()), out.size());
    return out;
}

}  // namespace

void bind_pads(py::module_& module) {
    using namespace py::literals;
    py::class_<PadKeys, std::shared_ptr<PadKeys>>(module, "PadKeys")
        .def(py::init(&make_keys), "session"_a, "model_digest"_a, "key_epoch"_a, "num_linears"_a,
             "seed"_a = py::none())
        .def_property_readonly("num_linears", &PadKeys::num_linears)
        .def_property_readonly("key_id", &PadKeys::key_id);
    module.def("draw_pads", &draw_pads, "key"_a, "row"_a, "inputs"_a);
    module.def("pads_of_stream", &pads_of_stream, "stream"_a, "inputs"_a);
    module.def("hkdf_sha256", &hkdf_sha256, "salt"_a, "ikm"_a, "info"_a, "size"_a);
    module.def("pads_instruction_set", [] { return active_pad_kernels().name; });
}

}  // namespace tsqp
