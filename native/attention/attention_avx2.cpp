#include "attention/attention_impl.h"
#include "kernels/lanes_avx2.h"

namespace tsqp {

constinit const AttentionTable kAvx2Attention = attention_table<Avx2Lanes>("avx2");

}  // namespace tsqp
