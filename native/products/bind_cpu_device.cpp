// `tsqp_shm.gpu._products`: the GPU process's operations for a CPU device (cpu_products.h). Slots and rows
// are checked with Python's lock held, then the products run without it.
//
// An extension of its own: the TEE process loads none of it. Slots are `_native`'s, whose type pybind11 knows
// in every extension; so the mapping is held, and released, in one place. The threads are this extension's
// own. The instruction set is told by name, as the choice is `_native`'s. A fault in an arena that was taken
// away is handled by
// `_native`'s ArenaGuard for the whole process, and the next look at a ring raises.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "border/held_slots.h"
#include "cpu/thread_pool.h"
#include "products/cpu_products.h"

namespace tsqp {
namespace {

using SegmentTuple = std::tuple<std::size_t, std::size_t, std::size_t, std::size_t>;
using KeyRangeTuple = std::pair<std::size_t, std::size_t>;
using Weight = py::array_t<std::uint16_t, py::array::c_style>;
using BlockTable = py::array_t<std::int32_t, py::array::c_style>;

constexpr std::array<std::string_view, 5> kLinears = {"qk", "v", "o", "gate_up", "down"};

CpuProducts::Linear linear_named(std::string_view name) {
    for (std::size_t i = 0; i < kLinears.size(); ++i)
        if (kLinears[i] == name) return static_cast<CpuProducts::Linear>(i);
    throw py::value_error("no Linear is called '" + std::string(name) + "'");
}

void require_matrix(const Weight& weight) {
    if (weight.ndim() != 2) throw py::value_error("weight: expected a matrix");
}

PackedLinear packed(const Weight& weight, const std::optional<Weight>& bias) {
    require_matrix(weight);
    if (bias && (bias->ndim() != 1 || bias->shape(0) != weight.shape(0)))
        throw py::value_error("bias: expected as many elements as weight has rows");
    const std::uint16_t* weights = weight.data();
    const std::uint16_t* biases = bias ? bias->data() : nullptr;
    const auto columns = static_cast<std::size_t>(weight.shape(0)),
               depth = static_cast<std::size_t>(weight.shape(1));
    const py::gil_scoped_release unlocked;
    return {weights, columns, depth, biases};
}

// The products with the slots they work on and the embedding they read.
class HeldProducts {
  public:
    HeldProducts(HeldSlots& slots, std::string_view instruction_set, std::vector<std::int32_t> blocks,
                 const CpuGeometry& geometry)
        : slots_(slots), products_(geometry, std::move(blocks), instruction_set) {}

    void set_linear(std::size_t layer, std::string_view name, const Weight& weight,
                    const std::optional<Weight>& bias) {
        products_.set_linear(layer, linear_named(name), packed(weight, bias));
    }
    void set_lm_head(const Weight& weight) { products_.set_lm_head(packed(weight, std::nullopt)); }
    void set_embedding(Weight embedding) {
        require_matrix(embedding);
        products_.set_embedding(embedding.data(), static_cast<std::size_t>(embedding.shape(0)),
                                static_cast<std::size_t>(embedding.shape(1)));
        embedding_ = std::move(embedding);
    }
    void clear_values(std::size_t sequence, std::size_t begin, std::size_t end) {
        products_.clear_values(sequence, begin, end);
    }
    void begin_step(const std::vector<SegmentTuple>& segments,
                    const std::vector<std::vector<KeyRangeTuple>>& seen) {
        std::vector<CpuProducts::Segment> of_step;
        for (const auto& [sequence, position, first_row, rows] : segments)
            of_step.push_back({sequence, position, first_row, rows});
        std::vector<std::vector<CpuProducts::KeyRange>> keys;
        for (const auto& of_window : seen) {
            auto& ranges = keys.emplace_back();
            for (const auto& [start, columns] : of_window) ranges.push_back({start, columns});
        }
        products_.begin_step(std::move(of_step), std::move(keys));
    }

    void embed(std::size_t in_slot, std::size_t out_slot, std::size_t first_row, std::size_t rows) {
        run([&, tokens = slots_.rows(in_slot, first_row, rows),
             hidden = slots_.rows(out_slot, first_row, rows)] { products_.embed(tokens, hidden); });
    }
    void qkv(std::size_t layer, std::size_t in_slot, std::size_t out_slot, std::size_t first_row,
             std::size_t rows) {
        run([&, x = slots_.rows(in_slot, first_row, rows), qk = slots_.rows(out_slot, first_row, rows)] {
            products_.qkv(layer, first_row, x, qk);
        });
    }
    void scores(std::size_t layer, std::size_t window, std::size_t in_slot, std::size_t out_slot,
                std::size_t first_segment, std::size_t num_segments) {
        run([&, qk = slots_.all_rows(in_slot), out = slots_.all_rows(out_slot)] {
            products_.scores(layer, window, first_segment, num_segments, qk, out);
        });
    }
    void context(std::size_t layer, std::size_t window, std::size_t in_slot, std::size_t first_segment,
                 std::size_t num_segments) {
        run([&, probabilities = slots_.all_rows(in_slot)] {
            products_.context(layer, window, first_segment, num_segments, probabilities);
        });
    }
    void output(std::size_t layer, std::size_t out_slot, std::size_t first_row, std::size_t rows) {
        run([&, hidden = slots_.rows(out_slot, first_row, rows)] {
            products_.output(layer, first_row, hidden);
        });
    }
    void linear(std::size_t layer, std::string_view name, std::size_t in_slot, std::size_t out_slot,
                std::size_t first_row, std::size_t rows) {
        run([&, which = linear_named(name), x = slots_.rows(in_slot, first_row, rows),
             out = slots_.rows(out_slot, first_row, rows)] { products_.linear(layer, which, x, out); });
    }
    void lm_head(std::size_t in_slot, std::size_t out_slot, std::size_t first_row, std::size_t rows) {
        run([&, x = slots_.rows(in_slot, first_row, rows), out = slots_.rows(out_slot, first_row, rows)] {
            products_.lm_head(x, out);
        });
    }

  private:
    template <class Body>
    void run(const Body& body) {
        const HeldSlots::Running running(slots_);
        const py::gil_scoped_release unlocked;
        body();
    }

    HeldSlots& slots_;
    CpuProducts products_;
    Weight embedding_;
};

}  // namespace

}  // namespace tsqp

PYBIND11_MODULE(_products, module) {
    using namespace tsqp;
    using namespace py::literals;
    module.doc() = "The GPU process's products where its device is the CPU: native/products/cpu_products.h.";
    // Whose SlotTable the products take.
    py::module_::import("tsqp_shm._native");
    module.def(
        "panel_kernels",
        [](const std::string& instruction_set) -> std::optional<std::string> {
            const PanelKernels* kernels = panel_kernels_of(instruction_set);
            return kernels == nullptr ? std::nullopt : std::optional<std::string>(kernels->name);
        },
        "instruction_set"_a);
    module.def(
        "set_num_threads",
        [](std::size_t num_threads, std::size_t patience_us) {
            set_num_threads(num_threads, std::chrono::microseconds(patience_us));
        },
        "num_threads"_a, "patience_us"_a = 0);
    module.def("get_num_threads", get_num_threads);
    py::class_<HeldProducts>(module, "CpuProducts")
        .def(py::init([](HeldSlots& slots, const std::string& instruction_set, const BlockTable& blocks,
                         std::size_t num_layers, std::size_t hidden, std::size_t intermediate,
                         std::size_t num_heads, std::size_t num_kv_heads, std::size_t head_dim,
                         std::size_t vocabulary, std::size_t max_tokens) {
                 if (blocks.ndim() != 2) throw py::value_error("blocks: expected a matrix");
                 const auto max_sequences = static_cast<std::size_t>(blocks.shape(0)),
                            max_keys = static_cast<std::size_t>(blocks.shape(1)) * kKeyBlock;
                 return std::make_unique<HeldProducts>(
                     slots, instruction_set, std::vector(blocks.data(), blocks.data() + blocks.size()),
                     CpuGeometry{num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim,
                                 vocabulary, max_tokens, max_sequences, max_keys});
             }),
             "slots"_a, "instruction_set"_a, "blocks"_a, py::kw_only(), "num_layers"_a, "hidden"_a,
             "intermediate"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "vocabulary"_a, "max_tokens"_a,
             py::keep_alive<1, 2>())
        .def("set_linear", &HeldProducts::set_linear, "layer"_a, "name"_a, "weight"_a, "bias"_a.none(true))
        .def("set_lm_head", &HeldProducts::set_lm_head, "weight"_a)
        .def("set_embedding", &HeldProducts::set_embedding, "embedding"_a)
        .def("clear_values", &HeldProducts::clear_values, "sequence"_a, "begin"_a, "end"_a)
        .def("begin_step", &HeldProducts::begin_step, "segments"_a, "keys"_a)
        .def("embed", &HeldProducts::embed, "in_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a)
        .def("qkv", &HeldProducts::qkv, "layer"_a, "in_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a)
        .def("scores", &HeldProducts::scores, "layer"_a, "window"_a, "in_slot"_a, "out_slot"_a,
             "first_segment"_a, "num_segments"_a)
        .def("context", &HeldProducts::context, "layer"_a, "window"_a, "in_slot"_a, "first_segment"_a,
             "num_segments"_a)
        .def("output", &HeldProducts::output, "layer"_a, "out_slot"_a, "first_row"_a, "rows"_a)
        .def("linear", &HeldProducts::linear, "layer"_a, "name"_a, "in_slot"_a, "out_slot"_a, "first_row"_a,
             "rows"_a)
        .def("lm_head", &HeldProducts::lm_head, "in_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a);
}
