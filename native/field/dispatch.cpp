#include "cpu/instruction_sets.h"
#include "field/field.h"

namespace tsqp {

std::vector<const FieldKernels*> supported_field_kernels() {
    std::vector<const FieldKernels*> supported;
    for (const std::string_view name : instruction_sets()) {
        const FieldKernels* const kernels = &field_kernels_of(name);
        if (supported.empty() || supported.back() != kernels) supported.push_back(kernels);
    }
    return supported;
}

const FieldKernels& field_kernels_of(std::string_view instruction_set) {
    require_instruction_set(instruction_set, "instruction set");
#if defined(__x86_64__)
    if (instruction_set == "amx" && has_integer_tiles()) return kAmxField;
    if (instruction_set == "avx2") return kAvx2Field;
    if (instruction_set != "scalar") return has_vnni() ? kAvx512VnniField : kAvx2Field;
#endif
    return kScalarField;
}

}  // namespace tsqp
