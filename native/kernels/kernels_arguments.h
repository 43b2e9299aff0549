// What the kernel bindings take from Python: rows of slots, and by array_arguments.h the rest.
#pragma once

#include <string>

#include "border/held_slots.h"
#include "kernels/array_arguments.h"
#include "kernels/dispatch.h"

namespace tsqp {

inline const char* name_of(Dtype dtype) {
    constexpr const char* kNames[] = {"bf16", "f32", "i32", "u32"};
    return kNames[static_cast<std::size_t>(dtype) - 1];
}

inline void need_same_dtype(const Rows& a, const Rows& b) {
    if (a.dtype != b.dtype)
        throw py::type_error(std::string("the slots differ in dtype: ") + name_of(a.dtype) + " and " +
                             name_of(b.dtype));
}

inline void need_floating(const Rows& slot) {
    if (!is_floating(slot.dtype))
        throw py::type_error(std::string("the slot holds ") + name_of(slot.dtype) + ", expected bf16 or f32");
}

inline const ElementKernels& kernels_for(const Rows& slot) {
    need_floating(slot);
    const KernelTable& table = active_kernels();
    return slot.dtype == Dtype::bf16 ? table.bf16 : table.f32;
}

}  // namespace tsqp
