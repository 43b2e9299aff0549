// As kernels_avx512.cpp, with the processor's own rounding to bf16.

#include "kernels/kernels_impl.h"
#include "kernels/lanes_avx512.h"

namespace tsqp {

constinit const KernelTable kAvx512Bf16Kernels = Kernels<Avx512Lanes>::table("avx512bf16");

}  // namespace tsqp
