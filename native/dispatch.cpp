#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tsqp {
namespace {

std::atomic<const KernelTable*> active{nullptr};

const KernelTable& find(std::string_view name, std::string_view asked_by) {
    std::string names;
    for (const KernelTable* table : supported_kernels()) {
        if (name == table->name) return *table;
        names += (names.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument(std::string(asked_by) + ": got '" + std::string(name) +
                                "', but this machine has: " + names);
}

}  // namespace

std::vector<const KernelTable*> supported_kernels() {
    std::vector<const KernelTable*> tables{&kScalarKernels};
#if defined(__x86_64__)
    // The builtin also asks the operating system whether it saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kAvx2Kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables.push_back(&kAvx512Kernels);
#endif
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
