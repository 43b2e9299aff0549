// The slot table: whatever plan and whatever (slot, first row, rows) it is asked for, what it lets through
// lies inside the arena. ASan watches the arena's ends; the arithmetic is done here again in 128 bits.
#include "border/slots.h"

#include <vector>

#include "engine.h"

using namespace tsqp;

namespace {

using Wide = unsigned __int128;

bool fits(const SlotEntry& slot, std::size_t size_bytes) {
    const Wide element_bytes = slot.dtype == Dtype::bf16 ? 2 : 4;
    return slot.offset_bytes % kPageBytes == 0 && slot.offset_bytes >= kSlotsOffset &&
           slot.row_elements > 0 && slot.row_elements <= size_bytes && slot.offset_bytes <= size_bytes &&
           Wide{slot.offset_bytes} + Wide{slot.num_rows} * slot.row_elements * element_bytes <= size_bytes;
}

template <class Act>
bool is_refused(Act act) {
    try {
        act();
    } catch (const std::out_of_range&) {
        return true;
    }
    return false;
}

void ask(const SlotTable& table, const std::vector<SlotEntry>& entries, Input& input) {
    const std::size_t slot = input.take_number(), first_row = input.take_number(), rows = input.take_number();
    const bool allowed =
        slot < entries.size() && Wide{first_row} + Wide{rows} <= Wide{entries[slot].num_rows};
    Rows found{};
    CHECK(is_refused([&] { found = table.rows(slot, first_row, rows); }) == !allowed);
    if (!allowed || rows == 0) return;
    const std::size_t bytes = found.rows * entries[slot].row_bytes();
    found.data[0] = found.data[bytes - 1] = std::byte{1};
}

int run_one(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    std::vector<std::byte> arena(kSlotsOffset + input.take<std::uint16_t>() / kWordBytes * kWordBytes);
    std::vector<SlotEntry> entries(input.take<std::uint8_t>() % 5);
    bool all_fit = true;
    for (SlotEntry& slot : entries) {
        const std::uint64_t offset = input.take_number();
        // Pages, as a rule, as an offset that is no multiple of a page is soon refused.
        slot.offset_bytes = offset < UINT8_MAX ? kSlotsOffset + offset * kPageBytes : offset;
        slot.num_rows = input.take_number();
        slot.row_elements = input.take_number();
        slot.dtype = static_cast<Dtype>(1 + input.take<std::uint8_t>() % 3);
        all_fit = all_fit && fits(slot, arena.size());
    }
    CHECK(is_refused([&] { SlotTable(arena.data(), arena.size(), entries); }) == !all_fit);
    if (!all_fit) return 0;
    const SlotTable table(arena.data(), arena.size(), entries);
    while (!input.empty()) ask(table, entries, input);
    return 0;
}

}  // namespace

int main(int argc, char** argv) { return LLVMFuzzerRunDriver(&argc, &argv, run_one); }
