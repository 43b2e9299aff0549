// Which file binds what of `_native`; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace tsqp {

void bind_elementary(pybind11::module_& module);   // bind_elementary.cpp: rope tables, logarithm, power
void bind_ring(pybind11::module_& module);         // bind_ring.cpp: layout constants, rings, heartbeat
void bind_submissions(pybind11::module_& module);  // bind_submissions.cpp: loans, tallies, submissions
void bind_kernels(pybind11::module_& module);      // bind_kernels.cpp: slot table, kernels, instruction sets
void bind_attention(pybind11::module_& module);    // bind_attention.cpp: private KV cache, attention
void bind_sampler(pybind11::module_& module);      // bind_sampler.cpp: drawing tokens, log probabilities
void bind_field(pybind11::module_& module);        // bind_field.cpp: Linears of w8
void bind_pads(pybind11::module_& module);         // bind_pads.cpp: keys of pads
void bind_pad_stock(pybind11::module_& module);    // bind_pad_stock.cpp: pads made ahead

}  // namespace tsqp
