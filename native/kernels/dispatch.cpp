#include "kernels/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/instruction_sets.h"

namespace tsqp {
namespace {

#if defined(__x86_64__)
// Tiles are for the GPU process's products (products/panels.h); the TEE's kernels are those of AVX512_BF16.
const KernelTable kAmxKernels{"amx",
                              kAvx512Bf16Kernels.bf16,
                              kAvx512Bf16Kernels.f32,
                              kAvx512Bf16Kernels.exp_nonpositive,
                              kAvx512Bf16Kernels.logit_maxima,
                              kAvx512Bf16Kernels.logit_weights};
#endif

const KernelTable* const kTables[] = {
    &kScalarKernels,
#if defined(__x86_64__)
    &kAvx2Kernels,   &kAvx512Kernels, &kAvx512Bf16Kernels, &kAmxKernels,
#endif
};

std::atomic<const KernelTable*> active{nullptr};

const KernelTable& table_of(std::string_view name) {
    for (const KernelTable* table : kTables)
        if (name == table->name) return *table;
    throw std::logic_error("no kernels for " + std::string(name));
}

const KernelTable& find(std::string_view name, std::string_view asked_by) {
    require_instruction_set(name, asked_by);
    return table_of(name);
}

}  // namespace

std::vector<const KernelTable*> supported_kernels() {
    std::vector<const KernelTable*> tables;
    for (const std::string_view name : instruction_sets()) tables.push_back(&table_of(name));
    return tables;
}

const KernelTable& active_kernels() {
    const KernelTable* table = active.load(std::memory_order_acquire);
    if (table == nullptr) {
        const char* forced = std::getenv("TSQP_SHM_ISA");
        table = forced && *forced ? &find(forced, "TSQP_SHM_ISA") : supported_kernels().back();
        active.store(table, std::memory_order_release);
    }
    return *table;
}

void use_kernels(std::string_view name) {
    active.store(&find(name, "instruction set"), std::memory_order_release);
}

}  // namespace tsqp
