#include "kernels/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(__x86_64__)
// Tiles are for the GPU process's products (panels.h); the TEE's kernels are those of AVX512_BF16.
const KernelTable kAmxKernels{"amx", kAvx512Bf16Kernels.bf16, kAvx512Bf16Kernels.f32,
                              kAvx512Bf16Kernels.exp_nonpositive};

// The processor has tiles, and the kernel lets this process keep their eight KiB of state.
bool has_tiles() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

std::vector<const KernelTable*> supported_kernels() {
    std::vector<const KernelTable*> tables{&kScalarKernels};
#if defined(__x86_64__)
    // The builtin also asks the operating system whether it saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kAvx2Kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        tables.push_back(&kAvx512Kernels);
        if (__builtin_cpu_supports("avx512bf16")) {
            tables.push_back(&kAvx512Bf16Kernels);
            static const bool tiles = has_tiles();
            if (tiles) tables.push_back(&kAmxKernels);
        }
    }
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
