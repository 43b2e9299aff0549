#include "products/panels.h"

#include <string_view>

#include "cpu/instruction_sets.h"

namespace tsqp {

std::vector<const PanelKernels*> supported_panel_kernels() {
    std::vector<const PanelKernels*> tables;
    for (const std::string_view name : instruction_sets()) {
        const PanelKernels* table = panel_kernels_of(name);
        if (table != nullptr && (tables.empty() || tables.back() != table)) tables.push_back(table);
    }
    return tables;
}

const PanelKernels* panel_kernels_of(std::string_view instruction_set) {
    require_instruction_set(instruction_set, "instruction set");
#if defined(__x86_64__)
    if (instruction_set == "amx") return &kAmxPanels;
    if (instruction_set == "avx512bf16") return &kAvx512Bf16Panels;
    if (instruction_set != "scalar") return &kAvx2Panels;
#endif
    return nullptr;
}

void pack_panels(const std::uint16_t* weight, std::size_t columns, std::size_t depth, std::uint16_t* panels) {
    for (std::size_t panel = 0; panel < num_panels(columns); ++panel)
        for (std::size_t k = 0; k < depth; k += 2)
            for (std::size_t c = 0; c < kPanelColumns; ++c) {
                const std::size_t column = panel * kPanelColumns + c;
                *panels++ = column < columns ? weight[column * depth + k] : std::uint16_t{0};
                *panels++ = column < columns ? weight[column * depth + k + 1] : std::uint16_t{0};
            }
}

}  // namespace tsqp
