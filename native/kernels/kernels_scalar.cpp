// The oracle, compiled with vectorisation off. Every other table must match its bits.

#include "kernels/kernels_impl.h"
#include "kernels/lanes_scalar.h"

namespace tsqp {

constinit const KernelTable kScalarKernels = Kernels<ScalarLanes>::table("scalar");

}  // namespace tsqp
