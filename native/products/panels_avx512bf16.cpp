// Products of panels with the bf16 dot-product instruction.

#include "products/panels_avx512.h"

namespace tsqp {
namespace {

void product(const PanelArgs& a, std::size_t begin, std::size_t end) noexcept {
    for (std::size_t panel = begin; panel < end; ++panel) {
        const PanelStore store(a, panel);
        std::size_t row = 0;
        for (; row + 8 <= a.rows; row += 8) panel_of_rows<8>(a, panel, row, store);
        if (row + 4 <= a.rows) {
            panel_of_rows<4>(a, panel, row, store);
            row += 4;
        }
        switch (a.rows - row) {
            case 1:
                panel_of_rows<1>(a, panel, row, store);
                break;
            case 2:
                panel_of_rows<2>(a, panel, row, store);
                break;
            case 3:
                panel_of_rows<3>(a, panel, row, store);
                break;
            default:
                break;
        }
    }
}

}  // namespace

constinit const PanelKernels kAvx512Bf16Panels{"avx512bf16", false, product};

}  // namespace tsqp
