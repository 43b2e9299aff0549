// `_native.FieldLinear` and `_native.FieldCheck`.

#include "bindings.h"
#include "field/held_linear.h"

namespace tsqp {

void bind_field(py::module_& module) {
    using namespace py::literals;
    py::class_<HeldLinear, std::shared_ptr<HeldLinear>>(module, "FieldLinear")
        .def(py::init<Index, Index>(), "outputs"_a, "inputs"_a)
        .def("set_rows", &HeldLinear::set_rows, "first_output"_a, "weight"_a)
        .def("set_bias", &HeldLinear::set_bias, "bias"_a)
        .def_property_readonly("scales", &HeldLinear::scales)
        .def_property_readonly("bias", &HeldLinear::bias)
        .def("quantised", &HeldLinear::quantised, "first_output"_a, "rows"_a)
        .def_property_readonly("num_bytes", &HeldLinear::num_bytes)
        .def("apply", &HeldLinear::apply, "slots"_a, "in_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a)
        .def("multiply", &HeldLinear::multiply, "slots"_a, "in_slot"_a, "out_slot"_a, "first_row"_a,
             "rows"_a);
    py::class_<HeldCheck>(module, "FieldCheck")
        .def(py::init([](HeldLinear& linear, const py::array& vectors, bool is_blinded) {
                 return linear.check(vectors, is_blinded);
             }),
             "linear"_a, "vectors"_a, "is_blinded"_a = false)
        .def_property_readonly("num_bytes", &HeldCheck::num_bytes)
        .def("fetch", &HeldCheck::fetch)
        .def("begin", &HeldCheck::begin, "slots"_a, "x_slot"_a, "m_slot"_a, "first_row"_a, "rows"_a,
             "copy"_a = py::none(), "pads"_a = py::none())
        .def("finish", &HeldCheck::finish, "slots"_a, "y_slot"_a, "out_slot"_a, "first_row"_a, "rows"_a,
             "copy"_a = py::none());
    module.def(
        "quantise_rows", [](const py::array& x, HeldLinear& linear) { return linear.quantise(x); }, "x"_a,
        "linear"_a);
    module.def("field_instruction_set", [] { return active_field_kernels().name; });
}

}  // namespace tsqp
