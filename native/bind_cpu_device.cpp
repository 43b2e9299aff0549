// The GPU process's kernels for a CPU device (few_rows.h, heads.h): checks what Python passes, then runs them
// without the interpreter's lock.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "bindings.h"
#include "dispatch.h"
#include "few_rows.h"
#include "heads.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace tsqp {
namespace {

// Bytes of weights, keys or values that make a second thread worth its wake-up.
constexpr std::size_t kBytesPerThread = 128 * 1024;

// The kernels that go with the instruction set in use; null: a GEMM library does better.
const FewRowsKernels* few_rows_kernels() {
#if defined(__x86_64__)
    const std::string_view active = active_kernels().name;
    if (active == "avx512" && __builtin_cpu_supports("avx512bf16")) return &kAvx512Bf16FewRows;
    if (active != "scalar" && __builtin_cpu_supports("fma")) return &kAvx2FewRows;
#endif
    return nullptr;
}

const FewRowsElementKernels& kernels_for(const py::array& array) {
    const FewRowsKernels* kernels = few_rows_kernels();
    if (kernels == nullptr) throw py::value_error("this instruction set has no kernels for few rows");
    if (py::isinstance<py::array_t<std::uint16_t>>(array)) return kernels->bf16;
    if (py::isinstance<py::array_t<float>>(array)) return kernels->f32;
    throw py::type_error("expected uint16 (the bits of bfloat16) or float32");
}

std::size_t extent(const py::array& array, int axis) { return static_cast<std::size_t>(array.shape(axis)); }

// Raises unless `array` has this dtype and shape, and its last axes from `dense_from` on are dense.
void require(const char* name, const py::array& array, const py::array& same_dtype,
             std::initializer_list<std::size_t> shape, int dense_from) {
    if (!array.dtype().is(same_dtype.dtype())) throw py::type_error(std::string(name) + ": another dtype");
    bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
    int axis = 0;
    for (const std::size_t expected : shape) fits = fits && extent(array, axis++) == expected;
    if (!fits) throw py::value_error(std::string(name) + ": another shape");
    py::ssize_t stride = array.itemsize();
    for (axis = static_cast<int>(array.ndim()) - 1; axis >= dense_from; --axis) {
        if (array.strides(axis) != stride && array.shape(axis) > 1)
            throw py::value_error(std::string(name) + ": not dense");
        stride *= array.shape(axis);
    }
    for (axis = 0; axis < dense_from; ++axis)
        if (array.strides(axis) < 0 || array.strides(axis) % array.itemsize() != 0)
            throw py::value_error(std::string(name) + ": a stride is not a whole number of elements");
}

template <class Body>
void run(std::size_t items, std::size_t item_bytes, const Body& body) {
    const py::gil_scoped_release unlocked;
    const std::size_t grain =
        std::max<std::size_t>(1, kBytesPerThread / std::max<std::size_t>(1, item_bytes));
    parallel_rows(items, grain, get_num_threads(), body);
}

void linear(const py::array& x, const py::array& weight, const std::optional<py::array>& bias,
            py::array& out) {
    const auto kernel = kernels_for(weight).linear;
    if (weight.ndim() != 2 || x.ndim() != 2) throw py::value_error("x and weight are matrices");
    const std::size_t rows = extent(x, 0), outputs = extent(weight, 0), inputs = extent(weight, 1);
    require("weight", weight, weight, {outputs, inputs}, 0);
    require("x", x, weight, {rows, inputs}, 0);
    require("out", out, weight, {rows, outputs}, 0);
    if (bias) require("bias", *bias, weight, {outputs}, 0);
    const LinearArgs args{x.data(), weight.data(), bias ? bias->data() : nullptr, out.mutable_data(), rows,
                          inputs,   outputs};
    const auto item_bytes = inputs * static_cast<std::size_t>(weight.itemsize());
    run(outputs, item_bytes,
        [&](std::size_t, std::size_t begin, std::size_t end) noexcept { kernel(args, begin, end); });
}

// One query row per head against the cache, which first takes the row's own key and value.
//
//   Shapes:   qk [(H+G)*D] and value [G*D], one row; keys [G, D, S] and values [G, S, D], views of one layer
//   and
//             sequence of the cache; out [H * columns]. The keys [start, start + columns) are scored, whole
//             blocks.
void decode_scores(const py::array& qk, const py::array& value, py::array& keys, py::array& values,
                   std::size_t position, std::size_t start, py::array& out) {
    const auto kernel = kernels_for(qk).decode_scores;
    if (keys.ndim() != 3 || out.ndim() != 1 || qk.ndim() != 1)
        throw py::value_error("another number of axes");
    const std::size_t groups = extent(keys, 0), dim = extent(keys, 1), capacity = extent(keys, 2);
    const std::size_t width = groups * dim, heads = width == 0 ? 0 : extent(qk, 0) / width - 1;
    require("qk", qk, qk, {(heads + 1) * width}, 0);
    require("value", value, qk, {width}, 0);
    require("keys", keys, qk, {groups, dim, capacity}, 0);
    require("values", values, qk, {groups, capacity, dim}, 0);
    const std::size_t columns = heads == 0 ? 0 : extent(out, 0) / (groups * heads);
    require("out", out, qk, {groups * heads * columns}, 0);
    if (heads == 0 || columns % kColumnBlock != 0 || columns > capacity || start > capacity - columns ||
        position >= capacity)
        throw py::value_error("the columns or the position do not lie inside the cache");
    const auto element = static_cast<std::size_t>(qk.itemsize());
    const auto* query_bytes = static_cast<const std::byte*>(qk.data());
    const auto* own_key = query_bytes + heads * width * element;
    const auto* own_value = static_cast<const std::byte*>(value.data());
    auto* key_bytes = static_cast<std::byte*>(keys.mutable_data());
    auto* value_bytes = static_cast<std::byte*>(values.mutable_data());
    auto* out_bytes = static_cast<std::byte*>(out.mutable_data());
    run(groups, dim * columns * element, [=](std::size_t, std::size_t begin, std::size_t end) noexcept {
        for (std::size_t group = begin; group < end; ++group) {
            std::byte* const group_keys = key_bytes + group * dim * capacity * element;
            for (std::size_t d = 0; d < dim; ++d)
                std::memcpy(group_keys + (d * capacity + position) * element,
                            own_key + (group * dim + d) * element, element);
            std::memcpy(value_bytes + (group * capacity + position) * dim * element,
                        own_value + group * dim * element, dim * element);
            kernel({query_bytes + group * heads * dim * element, group_keys + start * element,
                    out_bytes + group * heads * columns * element, heads, dim, columns, capacity},
                   0, columns / kColumnBlock);
        }
    });
}

// One row of probabilities per head times the cached values [start, start + columns).
//
//   Shapes:   probabilities [H * columns]; values [G, S, D]; out [H*D], one row.
void decode_context(const py::array& probabilities, const py::array& values, std::size_t start,
                    py::array& out) {
    const auto kernel = kernels_for(probabilities).decode_context;
    if (values.ndim() != 3 || probabilities.ndim() != 1 || out.ndim() != 1)
        throw py::value_error("another number of axes");
    const std::size_t groups = extent(values, 0), capacity = extent(values, 1), dim = extent(values, 2);
    const std::size_t heads = groups * dim == 0 ? 0 : extent(out, 0) / (groups * dim);
    require("out", out, probabilities, {groups * heads * dim}, 0);
    require("values", values, probabilities, {groups, capacity, dim}, 0);
    const std::size_t columns = heads == 0 ? 0 : extent(probabilities, 0) / (groups * heads);
    require("probabilities", probabilities, probabilities, {groups * heads * columns}, 0);
    if (heads == 0 || columns > capacity || start > capacity - columns)
        throw py::value_error("the columns do not lie inside the cache");
    const auto element = static_cast<std::size_t>(probabilities.itemsize());
    const auto* probability_bytes = static_cast<const std::byte*>(probabilities.data());
    const auto* value_bytes = static_cast<const std::byte*>(values.data());
    auto* out_bytes = static_cast<std::byte*>(out.mutable_data());
    run(groups, dim * columns * element, [=](std::size_t, std::size_t begin, std::size_t end) noexcept {
        for (std::size_t group = begin; group < end; ++group)
            kernel({probability_bytes + group * heads * columns * element,
                    value_bytes + (group * capacity + start) * dim * element,
                    out_bytes + group * heads * dim * element, heads, dim, columns});
    });
}

// Both directions take the rows [rows, heads * D], whose stride may be larger, and the blocks [heads, rows,
// D].
HeadsArgs heads_args(const py::array& rows, const py::array& blocks) {
    if (rows.ndim() != 2 || blocks.ndim() != 3)
        throw py::value_error("expected rows with two axes, blocks with three");
    const std::size_t heads = extent(blocks, 0), num_rows = extent(blocks, 1), dim = extent(blocks, 2);
    require("rows", rows, blocks, {num_rows, heads * dim}, 1);
    require("blocks", blocks, blocks, {heads, num_rows, dim}, 0);
    return {num_rows, heads, dim * static_cast<std::size_t>(blocks.itemsize()),
            static_cast<std::size_t>(rows.strides(0))};
}

void gather(const py::array& rows, py::array& blocks) {
    const HeadsArgs args = heads_args(rows, blocks);
    gather_heads(static_cast<const std::byte*>(rows.data()), static_cast<std::byte*>(blocks.mutable_data()),
                 args);
}

void scatter(const py::array& blocks, py::array& rows) {
    const HeadsArgs args = heads_args(rows, blocks);
    scatter_heads(static_cast<const std::byte*>(blocks.data()), static_cast<std::byte*>(rows.mutable_data()),
                  args);
}

}  // namespace

void bind_cpu_device(py::module_& module) {
    using namespace py::literals;
    module.def("has_few_rows_kernels", [] { return few_rows_kernels() != nullptr; });
    module.def("few_rows_linear", linear, "x"_a, "weight"_a, "bias"_a.none(true), "out"_a);
    module.def("decode_scores", decode_scores, "qk"_a, "value"_a, "keys"_a, "values"_a, "position"_a,
               "start"_a, "out"_a);
    module.def("gather_heads", gather, "rows"_a, "blocks"_a);
    module.def("scatter_heads", scatter, "blocks"_a, "rows"_a);
    module.def("decode_context", decode_context, "probabilities"_a, "values"_a, "start"_a, "out"_a);
}

}  // namespace tsqp
