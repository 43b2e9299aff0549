// What makes rW of pads r: a plug-in of the stock. The one here multiplies (direct_maker.h); another may make
// many rows of a Linear at once in some other way, as the rows that it is asked for are neighbours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

class PadMaker {
  public:
    virtual ~PadMaker() = default;
    // How many rows of a Linear it likes to make at once, 1 at least. It is never asked for more.
    virtual std::size_t batch_rows() const = 0;
    // products [rows, outputs] = r W mod p, in [0, p), of the rows [first_row, first_row + rows) of a Linear's
    // pads. Called by several threads at once, each with a Linear of its own. What it throws ends the stock.
    virtual void make(std::size_t linear, std::uint64_t first_row, std::size_t rows,
                      std::uint32_t* products) = 0;
};

}  // namespace tsqp
