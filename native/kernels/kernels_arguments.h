// What the kernel bindings take from Python, checked: slots on a held buffer, and private arrays.
// bind_kernels.cpp only.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "border/arena_guard.h"
#include "border/slots.h"
#include "kernels/dispatch.h"

namespace tsqp {

namespace py = pybind11;

using Index = py::ssize_t;  // signed, so that a negative argument is an IndexError that names it

inline std::size_t not_negative(const char* name, Index value) {
    if (value < 0)
        throw py::index_error(std::string(name) + ": got " + std::to_string(value) + ", expected >= 0");
    return static_cast<std::size_t>(value);
}

inline const char* name_of(Dtype dtype) {
    return dtype == Dtype::bf16 ? "bf16" : dtype == Dtype::f32 ? "f32" : "i32";
}

// A SlotTable on a Python buffer, which stays exported, so that nobody can unmap it, until release().
class HeldSlots {
  public:
    using Entry = std::tuple<std::size_t, std::size_t, std::size_t, std::uint32_t>;

    HeldSlots(const py::buffer& buffer, const std::vector<Entry>& entries) {
        for (const auto& [offset_bytes, num_rows, row_elements, dtype] : entries) {
            if (dtype < 1 || dtype > 3)
                throw py::value_error("dtype code " + std::to_string(dtype) + " is unknown");
            entries_.push_back({offset_bytes, num_rows, row_elements, static_cast<Dtype>(dtype)});
        }
        if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE | PyBUF_WRITABLE) != 0)
            throw py::error_already_set();
        try {
            if (reinterpret_cast<std::uintptr_t>(view_.buf) % kWordBytes != 0)
                throw py::value_error("the arena's memory is not aligned");
            const auto size_bytes = static_cast<std::size_t>(view_.len);
            // A row larger than the arena is refused before its size in bytes could wrap.
            for (const SlotEntry& entry : entries_)
                if (entry.row_elements > size_bytes) throw py::index_error("a row is larger than the arena");
            table_.emplace(static_cast<std::byte*>(view_.buf), size_bytes, entries_);
        } catch (...) {
            PyBuffer_Release(&view_);
            throw;
        }
    }
    ~HeldSlots() { let_go(); }
    HeldSlots(const HeldSlots&) = delete;
    HeldSlots& operator=(const HeldSlots&) = delete;

    void release() {
        if (running_ > 0) throw py::buffer_error("a kernel is running on these slots");
        let_go();
    }

    std::size_t size() const { return table_ ? table_->size() : 0; }

    Rows rows(std::size_t slot, std::size_t first_row, std::size_t rows) const {
        if (!table_) throw py::value_error("the slot table was released");
        return table_->rows(slot, first_row, rows);
    }
    Rows all_rows(std::size_t slot) const {
        return rows(slot, 0, slot < size() ? entries_[slot].num_rows : 0);
    }

    // Rows of exactly `row_elements` floating-point elements.
    Rows rows(std::size_t slot, std::size_t first_row, std::size_t num_rows, std::size_t row_elements) const {
        const Rows found = rows(slot, first_row, num_rows);
        if (found.row_elements != row_elements)
            throw py::value_error("slot " + std::to_string(slot) + ": its rows have " +
                                  std::to_string(found.row_elements) + " elements, expected " +
                                  std::to_string(row_elements));
        return found;
    }

    // Raises ArenaLost if the arena under the slots is gone.
    void require_intact() const { tsqp::require_intact(static_cast<const std::byte*>(view_.buf)); }

    // Counts a call that works on the mapping without Python's lock. Made and ended with the lock held.
    class Running {
      public:
        explicit Running(HeldSlots& slots) : slots_(slots) { ++slots_.running_; }
        ~Running() { --slots_.running_; }
        Running(const Running&) = delete;
        Running& operator=(const Running&) = delete;

      private:
        HeldSlots& slots_;
    };

  private:
    void let_go() {
        if (table_) PyBuffer_Release(&view_);
        table_.reset();
    }

    std::vector<SlotEntry> entries_;
    Py_buffer view_{};
    std::optional<SlotTable> table_;
    std::size_t running_ = 0;
};

inline void need_same_dtype(const Rows& a, const Rows& b) {
    if (a.dtype != b.dtype)
        throw py::type_error(std::string("the slots differ in dtype: ") + name_of(a.dtype) + " and " +
                             name_of(b.dtype));
}

inline const ElementKernels& kernels_for(const Rows& slot) {
    if (slot.dtype == Dtype::i32) throw py::type_error("the slot holds i32, expected bf16 or f32");
    const KernelTable& table = active_kernels();
    return slot.dtype == Dtype::bf16 ? table.bf16 : table.f32;
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
        throw py::type_error(fail(std::is_same_v<std::remove_const_t<T>, float> ? "float32" : "int32"));
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
