// Ws = W^T s mod p of secret vectors s.
#pragma once

#include <cstddef>
#include <cstdint>

#include "field/check_kernels.h"
#include "field/weights.h"

namespace tsqp {

// vectors [num_vectors, padded_to_step(outputs)] centred  ->  products [num_vectors, depth] centred, in one
// pass over the weights on the threads of the pool.
void multiply_vectors(const CheckKernels& kernels, const FieldWeights& weights, const std::int32_t* vectors,
                      std::size_t num_vectors, std::int32_t* products);

}  // namespace tsqp
