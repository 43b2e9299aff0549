#include "cpu/instruction_sets.h"
#include "field/check_kernels.h"
#include "field/field.h"

namespace tsqp {
namespace {

template <class Kernels>
std::vector<const Kernels*> supported(const Kernels& (*kernels_of)(std::string_view)) {
    std::vector<const Kernels*> tables;
    for (const std::string_view name : instruction_sets()) {
        const Kernels* const kernels = &kernels_of(name);
        if (tables.empty() || tables.back() != kernels) tables.push_back(kernels);
    }
    return tables;
}

}  // namespace

std::vector<const FieldKernels*> supported_field_kernels() { return supported(field_kernels_of); }
std::vector<const CheckKernels*> supported_check_kernels() { return supported(check_kernels_of); }

const FieldKernels& field_kernels_of(std::string_view instruction_set) {
    require_instruction_set(instruction_set, "instruction set");
#if defined(__x86_64__)
    if (instruction_set == "amx" && has_integer_tiles()) return kAmxField;
    if (instruction_set == "avx2") return kAvx2Field;
    if (instruction_set != "scalar") return has_vnni() ? kAvx512VnniField : kAvx2Field;
#endif
    return kScalarField;
}

const CheckKernels& check_kernels_of(std::string_view instruction_set) {
    require_instruction_set(instruction_set, "instruction set");
#if defined(__x86_64__)
    if (instruction_set == "avx2") return kAvx2Check;
    if (instruction_set != "scalar") return kAvx512Check;
#endif
    return kScalarCheck;
}

}  // namespace tsqp
