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
#if defined(__x86_64__)
    if (instruction_set == "scalar" || !has_aes()) return kScalarPads;
    if (instruction_set == "avx2" || !has_vaes()) return kAvx2AesPads;
    return kAvx512VaesPads;
#else
    (void)instruction_set;
    return kScalarPads;
#endif
}

}  // namespace tsqp
