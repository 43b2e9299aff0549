#include "products/panels.h"

#include <string_view>

#include "kernels/dispatch.h"

namespace tsqp {

std::vector<const PanelKernels*> supported_panel_kernels() {
    std::vector<const PanelKernels*> tables;
#if defined(__x86_64__)
    for (const KernelTable* kernels : supported_kernels()) {
        const PanelKernels* table = panel_kernels_of(kernels->name);
        if (table != nullptr && (tables.empty() || tables.back() != table)) tables.push_back(table);
    }
#endif
    return tables;
}

const PanelKernels* panel_kernels_of([[maybe_unused]] std::string_view instruction_set) {
#if defined(__x86_64__)
    if (instruction_set == "amx") return &kAmxPanels;
    if (instruction_set == "avx512bf16") return &kAvx512Bf16Panels;
    if (instruction_set != "scalar") return &kAvx2Panels;
#endif
    return nullptr;
}

const PanelKernels* active_panel_kernels() { return panel_kernels_of(active_kernels().name); }

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
