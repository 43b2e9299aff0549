// The kernels' bindings, instrumented, as a Python module of their own: tests/fuzz/kernels.py calls them, and
// `run` lets libFuzzer call it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "engine.h"

namespace py = pybind11;

namespace {

// libFuzzer's callback has no argument of its own.
py::function target;

int run_one(const std::uint8_t* data, std::size_t size) {
    try {
        target(py::bytes(reinterpret_cast<const char*>(data), size));
    } catch (py::error_already_set& error) {
        // Printed and aborted on, so that libFuzzer keeps the input.
        error.restore();
        PyErr_Print();
        std::abort();
    }
    return 0;
}

int run(std::vector<std::string> arguments, py::function one) {
    target = std::move(one);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    int argc = static_cast<int>(arguments.size());
    char** arguments_begin = argv.data();
    return LLVMFuzzerRunDriver(&argc, &arguments_begin, run_one);
}

}  // namespace

PYBIND11_MODULE(fuzz_kernels, module) {
    tsqp::bind_kernels(module);
    module.def("run", &run, py::arg("arguments"), py::arg("target"));
}
