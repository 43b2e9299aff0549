#include "field/digit_rows.h"

#include <cstring>

namespace tsqp {

void DigitRows::add_row(const FieldKernels& kernels, std::size_t index, std::size_t row,
                        const IntegerRow& of_row, const std::int32_t* integers, std::size_t inputs) const {
    DigitBlock& block = this->block(index);
    block.row[row] = of_row;
    block.has_pairs_alone &= of_row.digits == 2 && of_row.is_narrow;
    block.further[row] = static_cast<std::uint16_t>(block.digit_rows);
    for (std::size_t d = 0; d < of_row.digits; ++d) {
        const std::size_t digit_row = d < base_ ? row * base_ + d : block.digit_rows++;
        std::uint8_t* const bytes = digits(index) + digit_row * depth_;
        kernels.write_digit(integers, inputs, digit_offset(of_row.digits), static_cast<unsigned>(8 * d),
                            bytes);
        std::memset(bytes + inputs, 0, depth_ - inputs);
    }
}

}  // namespace tsqp
