// The oracle, compiled with vectorisation off. Every other table must match its bits.

#include "attention/attention_impl.h"
#include "kernels/lanes_scalar.h"

namespace tsqp {

constinit const AttentionTable kScalarAttention = attention_table<ScalarLanes>("scalar");

}  // namespace tsqp
