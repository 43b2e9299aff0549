#include "cpu/instruction_sets.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tsqp {
namespace {

#if defined(__x86_64__)
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

std::vector<std::string_view> instruction_sets() {
    std::vector<std::string_view> names{"scalar"};
#if defined(__x86_64__)
    // The builtin also asks the operating system whether it saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        names.push_back("avx512");
        if (__builtin_cpu_supports("avx512bf16")) {
            names.push_back("avx512bf16");
            static const bool tiles = has_tiles();
            if (tiles) names.push_back("amx");
        }
    }
#endif
    return names;
}

bool has_vnni() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

bool has_integer_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kInt8 = 1u << 25;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kInt8) != 0;
#else
    return false;
#endif
}

bool has_aes() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("aes");
#else
    return false;
#endif
}

bool has_vaes() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("vaes");
#else
    return false;
#endif
}

void require_instruction_set(std::string_view name, std::string_view asked_by) {
    const std::vector<std::string_view> names = instruction_sets();
    if (std::find(names.begin(), names.end(), name) != names.end()) return;
    std::string known;
    for (const std::string_view each : names) known += (known.empty() ? "" : ", ") + std::string(each);
    throw std::invalid_argument(std::string(asked_by) + ": got '" + std::string(name) +
                                "', but this machine has: " + known);
}

}  // namespace tsqp
