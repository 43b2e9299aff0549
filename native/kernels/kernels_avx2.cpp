#include "kernels/kernels_impl.h"
#include "kernels/lanes_avx2.h"

namespace tsqp {

constinit const KernelTable kAvx2Kernels = Kernels<Avx2Lanes>::table("avx2");

}  // namespace tsqp
