#include "kernels/kernels_avx512.h"

namespace tsqp {

constinit const KernelTable kAvx512Kernels = Kernels<Avx512Lanes>::table("avx512");

}  // namespace tsqp
