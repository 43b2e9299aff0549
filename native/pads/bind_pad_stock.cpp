// `_native.PadStock` and `_native.PadRows`.

#include <pybind11/stl.h>

#include "bindings.h"
#include "pads/held_stock.h"

namespace tsqp {

void bind_pad_stock(py::module_& module) {
    using namespace py::literals;
    py::class_<PadRows, std::shared_ptr<PadRows>>(module, "PadRows")
        .def_property_readonly("linear", &PadRows::linear)
        .def_property_readonly("first_row", &PadRows::first_row)
        .def_property_readonly("rows", &PadRows::rows);
    const auto of_stock = [](auto ask) { return [ask](const HeldStock& held) { return ask(held.stock()); }; };
    py::class_<HeldStock>(module, "PadStock")
        .def(py::init<std::shared_ptr<PadKeys>, const HeldStock::Linears&, Index, Index, bool>(), "keys"_a,
             "linears"_a, "capacity_rows"_a, "num_threads"_a, "lock"_a = false)
        .def_static("row_bytes", &HeldStock::row_bytes, "linears"_a)
        .def("take", &HeldStock::take, "linear"_a, "rows"_a)
        .def("wait", &HeldStock::wait, "linear"_a, "rows"_a, "timeout_s"_a)
        .def("rest", &HeldStock::rest, "is_asked"_a)
        .def("available_of", &HeldStock::available_of, "linear"_a)
        .def("close", &HeldStock::close)
        .def_property_readonly("available", of_stock([](const PadStock& stock) { return stock.available(); }))
        .def_property_readonly("capacity", of_stock([](const PadStock& stock) { return stock.capacity(); }))
        .def_property_readonly("num_bytes", of_stock([](const PadStock& stock) { return stock.num_bytes(); }))
        .def_property_readonly("is_locked", of_stock([](const PadStock& stock) { return stock.is_locked(); }))
        .def_property_readonly("made", of_stock([](const PadStock& stock) { return stock.counts().made; }))
        .def_property_readonly("used", of_stock([](const PadStock& stock) { return stock.counts().used; }))
        .def_property_readonly("burned",
                               of_stock([](const PadStock& stock) { return stock.counts().burned; }))
        .def_property_readonly("fault", of_stock([](const PadStock& stock) { return stock.fault(); }));
}

}  // namespace tsqp
