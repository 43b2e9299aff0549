// What bindings take from Python, checked: numbers and private arrays, none of which is the arena's.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <type_traits>

namespace tsqp {

namespace py = pybind11;

using Index = py::ssize_t;  // signed, so that a negative argument is an IndexError that names it

inline std::size_t not_negative(const char* name, Index value) {
    if (value < 0)
        throw py::index_error(std::string(name) + ": got " + std::to_string(value) + ", expected >= 0");
    return static_cast<std::size_t>(value);
}

// The memory of a private array of exactly this type and shape; -1 stands for any extent.
template <class T>
T* data_of(const py::array& array, const char* name, std::initializer_list<Index> shape,
           bool writeable = false) {
    const auto fail = [&](const char* expected) {
        return std::string(name) + ": expected " + expected + ", got " +
               py::str(array.dtype()).cast<std::string>() + py::str(array.attr("shape")).cast<std::string>();
    };
    if (array.dtype().num() != py::dtype::num_of<std::remove_const_t<T>>() ||
        array.dtype().byteorder() == '>')
        throw py::type_error(
            fail(py::str(py::dtype::of<std::remove_const_t<T>>()).cast<std::string>().c_str()));
    constexpr int kDense =
        py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & kDense) != kDense) throw py::value_error(fail("a dense, aligned array"));
    if (writeable && !array.writeable()) throw py::value_error(fail("a writeable array"));
    const auto fits = [](Index expected, Index found) { return expected == -1 || expected == found; };
    if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim(), fits)) {
        std::string expected = "shape (";
        for (const Index extent : shape) expected += (extent < 0 ? "*" : std::to_string(extent)) + ",";
        throw py::value_error(fail((expected + ")").c_str()));
    }
    // SAFETY: shape, type, density and alignment were checked; the caller's reference keeps the memory.
    return const_cast<T*>(static_cast<const T*>(array.data()));
}

// Every value of `indices` must lie in [0, limit). Returns one more than the largest.
inline std::size_t check_indices(const char* name, const std::int32_t* indices, std::size_t size,
                                 std::size_t limit) {
    std::size_t end = 0;
    for (std::size_t i = 0; i < size; ++i) {
        if (indices[i] < 0 || static_cast<std::size_t>(indices[i]) >= limit)
            throw py::index_error(std::string(name) + "[" + std::to_string(i) + "]: got " +
                                  std::to_string(indices[i]) + ", expected 0 to " + std::to_string(limit) +
                                  " exclusive");
        end = std::max(end, static_cast<std::size_t>(indices[i]) + 1);
    }
    return end;
}

}  // namespace tsqp
