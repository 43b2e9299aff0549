// What the kernel bindings take from Python: rows of slots, and by array_arguments.h the rest.
#pragma once

#include <string>

#include "border/held_slots.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"

namespace tsqp {

inline const char* name_of(Dtype dtype) {
    return dtype == Dtype::bf16 ? "bf16" : dtype == Dtype::f32 ? "f32" : "i32";
}

inline void need_same_dtype(const Rows& a, const Rows& b) {
    if (a.dtype != b.dtype)
        throw py::type_error(std::string("the slots differ in dtype: ") + name_of(a.dtype) + " and " +
                             name_of(b.dtype));
}

inline const ElementKernels& kernels_for(const Rows& slot) {
    if (slot.dtype == Dtype::i32) throw py::type_error("the slot holds i32, expected bf16 or f32");
    const KernelTable& table = active_kernels();
    return slot.dtype == Dtype::bf16 ? table.bf16 : table.f32;
}

}  // namespace tsqp
