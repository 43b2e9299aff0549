#include "attention/attention_impl.h"
#include "kernels/lanes_avx512.h"

namespace tsqp {

constinit const AttentionTable kAvx512Attention = attention_table<Avx512Lanes>("avx512");

}  // namespace tsqp
