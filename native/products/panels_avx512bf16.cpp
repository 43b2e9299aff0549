// Products of panels with the bf16 dot-product instruction.

#include "products/panels_avx512.h"

namespace tsqp {
namespace {

void product(const PanelArgs& a, std::size_t begin, std::size_t end) noexcept {
    if (a.a_is_f32)
        product_of_rows<float>(a, begin, end);
    else
        product_of_rows<std::uint16_t>(a, begin, end);
}

}  // namespace

constinit const PanelKernels kAvx512Bf16Panels{"avx512bf16", false, product};

}  // namespace tsqp
