// Slots on Python buffers, as kernels and products take them: `_native.SlotTable`, which `_products` takes
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

// A SlotTable on Python buffers, which stay exported, so that nobody can unmap them, until release(): an
// arena, memory of this process's own, or both.
class HeldSlots {
  public:
    using Entry = std::tuple<std::size_t, std::size_t, std::size_t, std::uint32_t>;

    HeldSlots(const std::optional<py::buffer>& arena, const std::vector<Entry>& shared,
              const std::optional<py::buffer>& own, const std::vector<Entry>& own_entries) {
        try {
            table_.emplace();
            if (arena) add(arena_, *arena, kSlotsOffset, shared);
            num_shared_ = num_rows_.size();
            if (own) add(own_, *own, 0, own_entries);
        } catch (...) {
            let_go();
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
        return rows(slot, 0, slot < num_rows_.size() ? num_rows_[slot] : 0);
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

    // Whether a slot lies in memory of this process's own.
    bool is_own(std::size_t slot) const { return slot >= num_shared_; }

    // Raises ArenaLost if the arena under the slots is gone.
    void require_intact() const {
        if (arena_.buf != nullptr) tsqp::require_intact(static_cast<const std::byte*>(arena_.buf));
    }

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
    void add(Py_buffer& view, const py::buffer& buffer, std::size_t first_offset,
             const std::vector<Entry>& given) {
        std::vector<SlotEntry> entries;
        for (const auto& [offset_bytes, num_rows, row_elements, dtype] : given) {
            if (dtype < 1 || dtype > 4)
                throw py::value_error("dtype code " + std::to_string(dtype) + " is unknown");
            entries.push_back({offset_bytes, num_rows, row_elements, static_cast<Dtype>(dtype)});
            num_rows_.push_back(num_rows);
        }
        if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE | PyBUF_WRITABLE) != 0)
            throw py::error_already_set();
        if (reinterpret_cast<std::uintptr_t>(view.buf) % kWordBytes != 0)
            throw py::value_error("the arena's memory is not aligned");
        const auto size_bytes = static_cast<std::size_t>(view.len);
        // A row larger than the arena is refused before its size in bytes could wrap.
        for (const SlotEntry& entry : entries)
            if (entry.row_elements > size_bytes) throw py::index_error("a row is larger than the arena");
        table_->add(static_cast<std::byte*>(view.buf), size_bytes, first_offset, entries);
    }

    void let_go() {
        for (Py_buffer* view : {&arena_, &own_})
            if (view->obj != nullptr) PyBuffer_Release(view);
        table_.reset();
    }

    Py_buffer arena_{}, own_{};
    std::vector<std::size_t> num_rows_;
    std::size_t num_shared_ = 0;
    std::optional<SlotTable> table_;
    std::size_t running_ = 0;
};

}  // namespace tsqp
