// What the products are measured against: the instruction they are made of, in registers alone, and a plain
// read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

struct Peak {
    // Multiplications of one step.
    std::uint64_t multiplications;
    // Steps on one thread, with no memory. The result depends on each.
    std::uint64_t (*work)(std::uint64_t steps) noexcept;
};

#if defined(__x86_64__)
extern const Peak kVnniPeak, kTilePeak;

// Reads whole cache lines by AVX-512, as the products of one row do; the result depends on each.
std::uint64_t read_lines(const std::int8_t* from, std::size_t size_bytes) noexcept;
#endif

}  // namespace tsqp
