// A Linear of the model on packed weights (panels.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "products/panels.h"

namespace tsqp {

// W packed, with its bias.
class PackedLinear {
  public:
    PackedLinear() = default;
    // weight [N, K] bf16, row-major; bias [N] or null. Raises invalid_argument unless K is whole depth
    // blocks.
    PackedLinear(const std::uint16_t* weight, std::size_t columns, std::size_t depth,
                 const std::uint16_t* bias);

    std::size_t columns() const { return columns_; }
    std::size_t depth() const { return depth_; }
    // x [rows, K], dense, bf16 or f32  ->  out [rows, N], dense, bf16 or f32, on the threads of the pool.
    void apply(const PanelKernels& kernels, const void* x, bool x_is_f32, std::size_t rows, void* out,
               bool out_is_f32) const;

  private:
    std::size_t columns_ = 0, depth_ = 0;
    std::shared_ptr<std::byte> memory_;
    const std::uint16_t* panels_ = nullptr;  // in `memory_`
    std::vector<std::uint16_t> bias_;
};

}  // namespace tsqp
