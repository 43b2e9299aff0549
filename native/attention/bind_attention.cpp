// Checks every argument of a step of attention while Python's lock is held, then runs it without the lock.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention/attend.h"
#include "bindings.h"
#include "kernels/kernels_arguments.h"

namespace tsqp {
namespace {

std::unique_ptr<KeyValueCache> make_cache(Index num_kv_heads, Index head_dim, const py::array& blocks,
                                          const std::string& element) {
    const std::int32_t* table = data_of<const std::int32_t>(blocks, "blocks", {-1, -1});
    if (element != "bfloat16" && element != "float32")
        throw py::value_error("element: got '" + element + "', expected 'bfloat16' or 'float32'");
    return std::make_unique<KeyValueCache>(
        not_negative("num_kv_heads", num_kv_heads), not_negative("head_dim", head_dim),
        static_cast<std::size_t>(blocks.shape(0)), std::vector(table, table + blocks.size()),
        element == "bfloat16" ? KeyValueCache::Element::bf16 : KeyValueCache::Element::f32);
}

[[noreturn]] void refuse(std::size_t segment, const std::string& what) {
    throw py::index_error("segments[" + std::to_string(segment) + "]: " + what);
}

// Their rows ascend; those of one sequence are told in its order.
std::vector<Segment> checked_segments(const KeyValueCache& cache, const py::array& array) {
    const std::int32_t* words = data_of<const std::int32_t>(array, "segments", {-1, 4});
    const auto count = static_cast<std::size_t>(array.shape(0));
    std::vector<Segment> segments;
    std::vector<std::size_t> ends(cache.num_sequences());
    segments.reserve(count);
    for (std::size_t i = 0, end_row = 0; i < count; ++i, words += 4) {
        for (std::size_t j = 0; j < 4; ++j)
            if (words[j] < 0) refuse(i, "got " + std::to_string(words[j]) + ", expected >= 0");
        const Segment segment{static_cast<std::size_t>(words[0]), static_cast<std::size_t>(words[1]),
                              static_cast<std::size_t>(words[2]), static_cast<std::size_t>(words[3])};
        if (segment.sequence >= cache.num_sequences())
            refuse(i, "sequence " + std::to_string(segment.sequence) + " of a cache of " +
                          std::to_string(cache.num_sequences()));
        const std::size_t end = segment.position + segment.rows;
        if (end > cache.capacity())
            refuse(i, "positions up to " + std::to_string(end) + " of a cache of " +
                          std::to_string(cache.capacity()));
        if (segment.first_row < end_row)
            throw py::value_error("segments[" + std::to_string(i) + "]: begins at row " +
                                  std::to_string(segment.first_row) + ", but the one before ends at " +
                                  std::to_string(end_row));
        if (segment.position < ends[segment.sequence])
            throw py::value_error("segments[" + std::to_string(i) + "]: begins at position " +
                                  std::to_string(segment.position) +
                                  ", but the one before of its sequence ends at " +
                                  std::to_string(ends[segment.sequence]));
        end_row = segment.first_row + segment.rows;
        ends[segment.sequence] = end;
        if (segment.rows > 0) segments.push_back(segment);
    }
    return segments;
}

float finite(const char* name, float value) {
    if (!std::isfinite(value))
        throw py::value_error(std::string(name) + ": got " + std::to_string(value) +
                              ", expected a finite number");
    return value;
}

void need_f32(const Rows& rows, const char* name) {
    if (rows.dtype != Dtype::f32)
        throw py::type_error(std::string(name) + ": the slot holds " + name_of(rows.dtype) +
                             ", expected f32");
}

void attend_step(const KeyValueCache& cache, HeldSlots& slots, Index qkv_slot, Index out_slot,
                 const py::array& segment_array, Index num_heads, float scale, std::optional<Index> window,
                 std::optional<float> soft_cap, const std::optional<py::array>& sinks) {
    const std::size_t heads = not_negative("num_heads", num_heads), groups = cache.num_kv_heads();
    if (heads == 0 || heads % groups != 0)
        throw py::value_error("num_heads: got " + std::to_string(heads) + ", expected a multiple of the " +
                              std::to_string(groups) + " kv heads");
    if (window && *window < 1)
        throw py::value_error("window: got " + std::to_string(*window) + ", expected 1 or more");
    if (soft_cap && !(finite("soft_cap", *soft_cap) > 0))
        throw py::value_error("soft_cap: got " + std::to_string(*soft_cap) + ", expected more than 0");
    if (qkv_slot == out_slot) throw py::value_error("out_slot: expected another slot than qkv_slot");
    const std::vector<Segment> segments = checked_segments(cache, segment_array);
    const std::size_t end_row = segments.empty() ? 0 : segments.back().first_row + segments.back().rows;
    std::size_t row_elements = 0;
    if (__builtin_mul_overflow(heads + 2 * groups, cache.head_dim(), &row_elements))
        throw py::value_error("num_heads: got " + std::to_string(heads) + ", which no row can hold");
    const Rows qkv = slots.rows(not_negative("qkv_slot", qkv_slot), 0, end_row, row_elements);
    const Rows out = slots.rows(not_negative("out_slot", out_slot), 0, end_row, heads * cache.head_dim());
    need_f32(qkv, "qkv_slot");
    need_f32(out, "out_slot");
    // Heads of a multiple of 4 f32 are whole words, as is all that lies before them.
    const AttendStep step{reinterpret_cast<const float*>(qkv.data),
                          reinterpret_cast<float*>(out.data),
                          heads,
                          finite("scale", scale),
                          soft_cap.value_or(0.0f),
                          static_cast<std::size_t>(window.value_or(0)),
                          sinks ? data_of<const float>(*sinks, "sinks", {num_heads}) : nullptr};
    const AttentionTable& table = active_attention();
    const HeldSlots::Running running(slots);
    {
        const py::gil_scoped_release unlocked;
        attend(table, cache, step, segments);
    }
    slots.require_intact();
}

}  // namespace

void bind_attention(py::module_& module) {
    using namespace py::literals;
    py::class_<KeyValueCache>(module, "KeyValueCache")
        .def(py::init(&make_cache), "num_kv_heads"_a, "head_dim"_a, "blocks"_a, "element"_a = "bfloat16")
        .def_property_readonly("num_bytes", &KeyValueCache::num_bytes)
        .def_property_readonly("block_bytes", &KeyValueCache::block_bytes)
        .def("lock", &KeyValueCache::lock)
        .def(
            "read",
            [](const KeyValueCache& cache, Index sequence, Index positions) {
                const std::size_t index = not_negative("sequence", sequence);
                if (index >= cache.num_sequences())
                    throw py::index_error("sequence: got " + std::to_string(index) + ", expected 0 to " +
                                          std::to_string(cache.num_sequences()) + " exclusive");
                const std::size_t count = not_negative("positions", positions);
                const py::gil_scoped_release unlocked;
                return read_blocks(cache, index, count);
            },
            "sequence"_a, "positions"_a);
    module.def("attend", attend_step, "cache"_a, "slots"_a, "qkv_slot"_a, "out_slot"_a, "segments"_a,
               py::kw_only(), "num_heads"_a, "scale"_a, "window"_a = py::none(), "soft_cap"_a = py::none(),
               "sinks"_a = py::none());
    module.def(
        "hyperbolic_tangent",
        [](const py::array& from, const py::array& to) {
            const float* values = data_of<const float>(from, "from", {-1});
            float* results = data_of<float>(to, "to", {from.shape(0)}, true);
            active_attention().hyperbolic_tangent({values, results}, 0,
                                                  static_cast<std::size_t>(from.shape(0)));
        },
        "values"_a, "out"_a);
}

}  // namespace tsqp
