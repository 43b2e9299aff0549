#include "kernels/kernels_impl.h"
#include "kernels/lanes_avx512.h"

namespace tsqp {

constinit const KernelTable kAvx512Kernels = Kernels<Avx512Lanes>::table("avx512");

}  // namespace tsqp
