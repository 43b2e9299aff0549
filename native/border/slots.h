// Slots as native code sees them: (slot, first row, rows) in, a checked pointer out. Addresses never leave
// C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "border/layout.h"
#include "border/words.h"

namespace tsqp {

inline std::size_t element_bytes(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 4; }
inline bool is_floating(Dtype dtype) { return dtype == Dtype::bf16 || dtype == Dtype::f32; }

struct SlotEntry {
    std::size_t offset_bytes;  // from its memory's base
    std::size_t num_rows;
    std::size_t row_elements;
    Dtype dtype;

    std::size_t row_bytes() const { return row_elements * element_bytes(dtype); }
};

// A dense block of rows inside one slot.
struct Rows {
    std::byte* data;
    std::size_t rows;
    std::size_t row_elements;
    Dtype dtype;

    std::size_t row_bytes() const { return row_elements * element_bytes(dtype); }
};

class SlotTable {
  public:
    // Slots in an arena.
    SlotTable(std::byte* base, std::size_t size_bytes, const std::vector<SlotEntry>& entries) {
        add(base, size_bytes, kSlotsOffset, entries);
    }
    SlotTable() = default;

    // Slots in one more memory, which begin at `first_offset` or behind it; their numbers follow on those
    // that there are. Raises out_of_range unless each lies inside it.
    void add(std::byte* base, std::size_t size_bytes, std::size_t first_offset,
             const std::vector<SlotEntry>& entries) {
        // A slot begins at a word; then the word in which its last row ends is the memory's too.
        if (!is_whole_words(size_bytes)) throw std::out_of_range("the arena does not end with a whole word");
        for (const SlotEntry& slot : entries) {
            const bool aligned = slot.offset_bytes % kPageBytes == 0 && slot.offset_bytes >= first_offset;
            const bool fits = slot.offset_bytes <= size_bytes && slot.row_elements > 0 &&
                              slot.row_elements <= size_bytes &&
                              slot.num_rows <= (size_bytes - slot.offset_bytes) / slot.row_bytes();
            if (!aligned || !fits)
                throw std::out_of_range("a slot of the plan does not lie inside the arena");
            slots_.push_back({base + slot.offset_bytes, slot});
        }
    }

    std::size_t size() const { return slots_.size(); }

    // Raises out_of_range unless the slot exists and [first_row, first_row + rows) lies inside it.
    Rows rows(std::size_t slot, std::size_t first_row, std::size_t rows) const {
        if (slot >= slots_.size())
            throw std::out_of_range("slot " + std::to_string(slot) + " is not in the plan");
        const auto& [data, entry] = slots_[slot];
        if (first_row > entry.num_rows || rows > entry.num_rows - first_row)
            throw std::out_of_range("rows [" + std::to_string(first_row) + ", " + std::to_string(first_row) +
                                    " + " + std::to_string(rows) + ") of slot " + std::to_string(slot) +
                                    ", which has " + std::to_string(entry.num_rows));
        // SAFETY: `add` checked that every row of every entry lies inside its memory.
        return {data + first_row * entry.row_bytes(), rows, entry.row_elements, entry.dtype};
    }

  private:
    struct Placed {
        std::byte* data;
        SlotEntry entry;
    };
    std::vector<Placed> slots_;
};

}  // namespace tsqp
