#include "cpu/instruction_sets.h"
#include "pads/pad_kernels.h"

namespace tsqp {

std::vector<const PadKernels*> supported_pad_kernels() {
    std::vector<const PadKernels*> tables;
    for (const std::string_view name : instruction_sets()) {
        const PadKernels* const kernels = &pad_kernels_of(name);
        if (tables.empty() || tables.back() != kernels) tables.push_back(kernels);
    }
    return tables;
}

const PadKernels& pad_kernels_of(std::string_view instruction_set) {
    if (instruction_set.empty()) return kScalarPads;
    return kScalarPads;
}

}  // namespace tsqp
