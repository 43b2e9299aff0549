// Slots on a Python buffer, as kernels and products take them: `_native.SlotTable`, which `_products` takes
// too.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "border/arena_guard.h"
#include "border/slots.h"

namespace tsqp {

namespace py = pybind11;

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

}  // namespace tsqp
