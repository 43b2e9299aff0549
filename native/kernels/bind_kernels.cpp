// Checks every argument of a kernel while Python's lock is held, then runs it without the lock.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/thread_pool.h"
#include "kernels/dispatch.h"
#include "kernels/finite.h"
#include "kernels/kernels_arguments.h"
#include "kernels/scratch.h"

namespace tsqp {
namespace {

// Runs body(worker, begin, end) on all items without Python's lock. A thread takes about 16K elements at a
// time.
template <class Body>
void run(HeldSlots& slots, std::size_t items, std::size_t item_elements, std::size_t num_workers,
         const Body& body) {
    constexpr std::size_t kBlockElements = 16384;
    const HeldSlots::Running running(slots);
    {
        const py::gil_scoped_release unlocked;
        const std::size_t grain = kBlockElements / std::max<std::size_t>(1, item_elements);
        parallel_rows(items, std::max<std::size_t>(1, grain), num_workers, body);
    }
    // UNTRUSTED: what was computed from an arena that is gone is nobody's result.
    slots.require_intact();
}

template <class Args>
void run(HeldSlots& slots, std::size_t items, std::size_t item_elements,
         void (*kernel)(const Args&, std::size_t, std::size_t) noexcept, const Args& args) {
    run(slots, items, item_elements, get_num_threads(),
        [&](std::size_t, std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

// What the kernels may cross the border for: see words.h.
void need_whole_words(std::size_t slot, std::size_t size_bytes, const char* what) {
    if (!is_whole_words(size_bytes))
        throw py::value_error("slot " + std::to_string(slot) + ": " + what + " " +
                              std::to_string(size_bytes) + " bytes, expected whole words of 8");
}

void add_rms_norm(HeldSlots& slots, Index out_slot, Index out_first_row, std::optional<Index> delta_slot,
                  const py::array& residual, const std::optional<py::array>& row_index, Index first_row,
                  Index rows, const py::array& weight, float eps) {
    const std::size_t items = not_negative("rows", rows), first = not_negative("first_row", first_row);
    const float* weights = data_of<const float>(weight, "weight", {-1});
    float* stream = data_of<float>(residual, "residual", {-1, weight.shape(0)}, delta_slot.has_value());
    const auto hidden = static_cast<std::size_t>(weight.shape(0)),
               limit = static_cast<std::size_t>(residual.shape(0));
    const std::int32_t* indices = nullptr;
    std::size_t end = first + items;
    if (row_index) {
        if (first != 0) throw py::value_error("first_row: expected 0 where row_index is given");
        indices = data_of<const std::int32_t>(*row_index, "row_index", {rows});
        end = check_indices("row_index", indices, items, limit);
        // Two threads must not add to one row, nor one thread twice.
        if (delta_slot &&
            std::adjacent_find(indices, indices + items, std::greater_equal<>()) != indices + items)
            throw py::value_error("row_index: expected ascending rows, each once, where a delta is added");
    } else if (first > limit || items > limit - first) {
        throw py::index_error("rows [" + std::to_string(first) + ", +" + std::to_string(items) +
                              ") of the residual, which has " + std::to_string(limit));
    }
    const std::size_t out_slot_index = not_negative("out_slot", out_slot);
    const std::size_t out_first = not_negative("out_first_row", out_first_row);
    const Rows out = slots.rows(out_slot_index, out_first, items, hidden);
    need_whole_words(out_slot_index, out.row_bytes(), "a row takes");
    const void* delta = nullptr;
    if (delta_slot) {
        const Rows added = slots.rows(not_negative("delta_slot", *delta_slot), 0, end, hidden);
        need_same_dtype(added, out);
        if (*delta_slot == out_slot && (row_index || first != out_first))
            throw py::value_error("out_slot: rows would be overwritten before they are read as delta");
        delta = added.data;
    }
    run(slots, items, hidden, kernels_for(out).add_rms_norm,
        AddRmsNormArgs{delta, out.data, stream, indices, first, weights, hidden, eps});
}

Rows rows_from_a_word(const HeldSlots& slots, Index slot, Index first_row, Index rows) {
    const std::size_t index = not_negative("slot", slot), first = not_negative("first_row", first_row);
    const Rows found = slots.rows(index, first, not_negative("rows", rows));
    need_whole_words(index, first * found.row_bytes(), "before the first row lie");
    return found;
}

// UNTRUSTED: what is copied is numbers; an i32 slot's go to and from int32 arrays.
void load_rows(HeldSlots& slots, Index slot, Index first_row, Index rows, const py::array& out) {
    const Rows from = rows_from_a_word(slots, slot, first_row, rows);
    const std::initializer_list<Index> shape{rows, static_cast<Index>(from.row_elements)};
    const std::size_t elements = from.rows * from.row_elements;
    if (from.dtype == Dtype::i32) {
        read_words(data_of<std::int32_t>(out, "out", shape, true), from.data,
                   elements * sizeof(std::int32_t));
        slots.require_intact();
    } else {
        run(slots, elements, 1, kernels_for(from).load,
            LoadArgs{from.data, data_of<float>(out, "out", shape, true)});
    }
}

void store_rows(HeldSlots& slots, Index slot, Index first_row, Index rows, const py::array& values) {
    const Rows to = rows_from_a_word(slots, slot, first_row, rows);
    const std::initializer_list<Index> shape{rows, static_cast<Index>(to.row_elements)};
    const std::size_t elements = to.rows * to.row_elements;
    if (to.dtype == Dtype::i32) {
        write_words(to.data, data_of<const std::int32_t>(values, "values", shape),
                    elements * sizeof(std::int32_t));
        slots.require_intact();
    } else {
        const auto* from = data_of<const float>(values, "values", shape);
        run(slots, elements, 1, kernels_for(to).store, StoreArgs{from, to.data});
    }
}

void rope(HeldSlots& slots, Index qk_slot, Index first_row, Index rows, const py::array& positions,
          const py::array& cos, const py::array& sin, Index num_heads, Index head_dim) {
    const std::size_t heads = not_negative("num_heads", num_heads), dim = not_negative("head_dim", head_dim);
    if (dim % 2 != 0)
        throw py::value_error("head_dim: got " + std::to_string(dim) + ", expected an even number");
    const float* cosines = data_of<const float>(cos, "cos", {-1, head_dim / 2});
    const float* sines = data_of<const float>(sin, "sin", {cos.shape(0), head_dim / 2});
    const std::int32_t* at = data_of<const std::int32_t>(positions, "positions", {rows});
    const std::size_t items = not_negative("rows", rows);
    check_indices("positions", at, items, static_cast<std::size_t>(cos.shape(0)));
    const Rows qk = slots.rows(not_negative("qk_slot", qk_slot), not_negative("first_row", first_row), items);
    if (dim == 0 || qk.row_elements / dim < heads)
        throw py::value_error("the slot's rows have " + std::to_string(qk.row_elements) +
                              " elements, expected num_heads * head_dim or more");
    const auto kernel = kernels_for(qk).rope;
    need_whole_words(static_cast<std::size_t>(qk_slot), dim * element_bytes(qk.dtype), "a head takes");
    need_whole_words(static_cast<std::size_t>(qk_slot), qk.row_bytes(), "a row takes");
    const RopeArgs args{qk.data, at, cosines, sines, heads, dim, qk.row_elements};
    const std::size_t num_workers = get_num_threads();
    const Scratch scratch(num_workers, dim);
    run(slots, items, heads * dim, num_workers, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        kernel(args, scratch.of(worker), begin, end);
    });
}

void softmax(HeldSlots& slots, Index slot, Index offset_elements, Index num_heads, Index rows,
             Index num_columns, float scale, Index first_valid_end, std::optional<Index> window) {
    const Rows scores = slots.all_rows(not_negative("slot", slot));
    const std::size_t offset = not_negative("offset_elements", offset_elements);
    const std::size_t columns = not_negative("num_columns", num_columns), height = not_negative("rows", rows);
    std::size_t items = 0, elements = 0, end = 0;
    if (__builtin_mul_overflow(not_negative("num_heads", num_heads), height, &items) ||
        __builtin_mul_overflow(items, columns, &elements) || __builtin_add_overflow(offset, elements, &end) ||
        end > scores.rows * scores.row_elements)
        throw py::index_error("the tile does not lie inside slot " + std::to_string(slot) + ", which has " +
                              std::to_string(scores.rows * scores.row_elements) + " elements");
    const auto kernel = kernels_for(scores).softmax;
    const std::size_t offset_bytes = offset * element_bytes(scores.dtype);
    need_whole_words(static_cast<std::size_t>(slot), offset_bytes, "before the tile lie");
    if (columns % kLanes != 0)
        throw py::value_error("num_columns: got " + std::to_string(columns) + ", expected a multiple of " +
                              std::to_string(kLanes));
    // SAFETY: offset <= end, which is inside the slot.
    const SoftmaxArgs args{scores.data + offset_bytes,
                           height,
                           columns,
                           scale,
                           not_negative("first_valid_end", first_valid_end),
                           not_negative("window", window.value_or(0))};
    if (elements == 0) return;  // nothing of the slot bounds the number of columns here
    const std::size_t num_workers = get_num_threads();
    const Scratch scratch(num_workers, columns);
    run(slots, items, columns, num_workers, [&](std::size_t worker, std::size_t begin, std::size_t finish) {
        kernel(args, scratch.of(worker), begin, finish);
    });
}

bool all_finite(HeldSlots& slots, Index slot, Index offset_elements, Index num_elements) {
    const Rows rows = slots.all_rows(not_negative("slot", slot));
    const std::size_t offset = not_negative("offset_elements", offset_elements),
                      count = not_negative("num_elements", num_elements);
    const std::size_t elements = rows.rows * rows.row_elements;
    if (offset > elements || count > elements - offset)
        throw py::index_error("elements [" + std::to_string(offset) + ", +" + std::to_string(count) +
                              ") of slot " + std::to_string(slot) + ", which has " +
                              std::to_string(elements));
    need_floating(rows);
    need_whole_words(static_cast<std::size_t>(slot), offset * element_bytes(rows.dtype),
                     "before the elements lie");
    std::atomic<bool> finite{true};
    run(slots, count, 1, get_num_threads(), [&](std::size_t, std::size_t begin, std::size_t end) {
        // SAFETY: offset + end <= offset + count, which is inside the slot.
        const bool part = rows.dtype == Dtype::bf16
                              ? are_finite(reinterpret_cast<const std::uint16_t*>(rows.data) + offset + begin,
                                           end - begin, kBf16Exponent)
                              : are_finite(reinterpret_cast<const std::uint32_t*>(rows.data) + offset + begin,
                                           end - begin, kF32Exponent);
        if (!part) finite.store(false, std::memory_order_relaxed);
    });
    return finite;
}

void silu_mul(HeldSlots& slots, Index gate_up_slot, Index out_slot, Index first_row, Index rows) {
    const std::size_t first = not_negative("first_row", first_row), items = not_negative("rows", rows);
    if (gate_up_slot == out_slot) throw py::value_error("out_slot: expected another slot than gate_up_slot");
    const Rows out = slots.rows(not_negative("out_slot", out_slot), first, items);
    const Rows gate_up =
        slots.rows(not_negative("gate_up_slot", gate_up_slot), first, items, 2 * out.row_elements);
    need_same_dtype(gate_up, out);
    need_whole_words(static_cast<std::size_t>(out_slot), out.row_bytes(), "a row takes");
    run(slots, items, gate_up.row_elements, kernels_for(out).silu_mul,
        SiluMulArgs{gate_up.data, out.data, out.row_elements});
}

}  // namespace

void bind_kernels(py::module_& module) {
    using namespace py::literals;
    py::class_<HeldSlots>(module, "SlotTable")
        .def(py::init<const std::optional<py::buffer>&, const std::vector<HeldSlots::Entry>&,
                      const std::optional<py::buffer>&, const std::vector<HeldSlots::Entry>&>(),
             "arena"_a, "entries"_a, "own_memory"_a = py::none(),
             "own_entries"_a = std::vector<HeldSlots::Entry>())
        .def("__len__", &HeldSlots::size)
        .def("release", &HeldSlots::release);
    module.def("add_rms_norm", add_rms_norm, "slots"_a, "out_slot"_a, "out_first_row"_a, "delta_slot"_a,
               "residual"_a, "row_index"_a, "first_row"_a, "rows"_a, "weight"_a, "eps"_a);
    module.def("load_rows", load_rows, "slots"_a, "slot"_a, "first_row"_a, "rows"_a, "out"_a);
    module.def("store_rows", store_rows, "slots"_a, "slot"_a, "first_row"_a, "rows"_a, "values"_a);
    module.def("rope", rope, "slots"_a, "qk_slot"_a, "first_row"_a, "rows"_a, "positions"_a, "cos"_a, "sin"_a,
               "num_heads"_a, "head_dim"_a);
    module.def("softmax", softmax, "slots"_a, "slot"_a, "offset_elements"_a, "num_heads"_a, "rows"_a,
               "num_columns"_a, "scale"_a, "first_valid_end"_a, "window"_a);
    module.def("silu_mul", silu_mul, "slots"_a, "gate_up_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a);
    module.def("all_finite", all_finite, "slots"_a, "slot"_a, "offset_elements"_a, "num_elements"_a);
    module.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const KernelTable* table : supported_kernels()) names.emplace_back(table->name);
        return names;
    });
    module.def("active_instruction_set", [] { return active_kernels().name; });
    module.def("use_instruction_set", [](const std::string& name) { use_kernels(name); }, "name"_a);
    module.def(
        "set_num_threads",
        [](Index num_threads, Index patience_us) {
            set_num_threads(not_negative("num_threads", num_threads),
                            std::chrono::microseconds(not_negative("patience_us", patience_us)));
        },
        "num_threads"_a, "patience_us"_a = 0);
    module.def("get_num_threads", get_num_threads);
}

}  // namespace tsqp
