#include "bindings.h"

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native core of tsqp_shm: rings and kernels on the slots of a shared-memory arena.";
    tsqp::bind_elementary(module);
    tsqp::bind_ring(module);
    tsqp::bind_submissions(module);
    tsqp::bind_kernels(module);
    tsqp::bind_attention(module);
    tsqp::bind_sampler(module);
    tsqp::bind_field(module);
    tsqp::bind_pads(module);
    tsqp::bind_pad_stock(module);
}
