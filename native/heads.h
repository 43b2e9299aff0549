// Moves attention heads between the token-major rows of a Linear and the head-major blocks of a batched
// product, when the GPU process's device is the CPU. Plain copies of whole heads; nothing here runs in the
// TEE.
#pragma once

#include <cstddef>
#include <cstring>

namespace tsqp {

// Sizes in bytes but for the counts; a head is head_bytes long.
struct HeadsArgs {
    std::size_t rows, heads, head_bytes, row_stride_bytes;
};

// rows [rows, heads * D], row stride row_stride_bytes  ->  blocks [heads, rows, D], dense.
inline void gather_heads(const std::byte* rows, std::byte* blocks, const HeadsArgs& a) noexcept {
    for (std::size_t head = 0; head < a.heads; ++head)
        for (std::size_t row = 0; row < a.rows; ++row)
            std::memcpy(blocks + (head * a.rows + row) * a.head_bytes,
                        rows + row * a.row_stride_bytes + head * a.head_bytes, a.head_bytes);
}

// blocks [heads, rows, D], dense  ->  rows [rows, heads * D], row stride row_stride_bytes.
inline void scatter_heads(const std::byte* blocks, std::byte* rows, const HeadsArgs& a) noexcept {
    for (std::size_t row = 0; row < a.rows; ++row)
        for (std::size_t head = 0; head < a.heads; ++head)
            std::memcpy(rows + row * a.row_stride_bytes + head * a.head_bytes,
                        blocks + (head * a.rows + row) * a.head_bytes, a.head_bytes);
}

}  // namespace tsqp
