// rW by four-digit products of this process's own weights: as the GPU process multiplies, on one thread.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "field/weights.h"
#include "pads/keys.h"
#include "pads/maker.h"

namespace tsqp {

class DirectMaker : public PadMaker {
  public:
    // Of each Linear at its index, which nobody changes meanwhile. Raises invalid_argument unless there are as
    // many as keys.
    DirectMaker(std::shared_ptr<const PadKeys> keys, std::vector<const FieldWeights*> weights);

    std::size_t batch_rows() const override;
    void make(std::size_t linear, std::uint64_t first_row, std::size_t rows, std::uint32_t* products,
              const Rest& rest) override;

  private:
    const std::shared_ptr<const PadKeys> keys_;
    const std::vector<const FieldWeights*> weights_;
};

}  // namespace tsqp
