// Private floats for each thread of a job; kept, so that nothing is allocated once the largest was asked for.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.h"

namespace tsqp {

class Scratch {
  public:
    // Belongs to the thread that makes it, until it makes another.
    Scratch(std::size_t num_workers, std::size_t elements) : stride_((elements + kLanes - 1) / kLanes) {
        static thread_local std::vector<Block> blocks;
        if (blocks.size() < num_workers * stride_) blocks.resize(num_workers * stride_);
        first_ = blocks.data();
    }
    float* of(std::size_t worker) const { return first_[worker * stride_].lane; }

  private:
    struct alignas(64) Block {
        float lane[kLanes];
    };
    std::size_t stride_;
    Block* first_;
};

}  // namespace tsqp
