#include "panels.h"

#include <string_view>

#include "dispatch.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tsqp {
namespace {

#if defined(__x86_64__)
// The processor has the instructions, and the kernel lets this process keep the tiles' eight KiB of state.
bool has_tiles() {
#if defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
    constexpr int kRequestPermission = 0x1023,
                  kTileData = 18;  // asm/prctl.h, Documentation/arch/x86/xstate.rst
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

std::vector<const PanelKernels*> supported_panel_kernels() {
    std::vector<const PanelKernels*> tables;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&kAvx2Panels);
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16")) {
        tables.push_back(&kAvx512Bf16Panels);
        static const bool tiles = has_tiles();
        if (tiles) tables.push_back(&kAmxPanels);
    }
#endif
    return tables;
}

const PanelKernels* active_panel_kernels() {
    const std::string_view limit = active_kernels().name;
    const PanelKernels* best = nullptr;
    for (const PanelKernels* table : supported_panel_kernels())
        if (limit != "scalar" && (limit != "avx2" || table == supported_panel_kernels().front()))
            best = table;
    return best;
}

void pack_panels(const std::uint16_t* weight, std::size_t columns, std::size_t depth, std::uint16_t* panels) {
    for (std::size_t panel = 0; panel < num_panels(columns); ++panel)
        for (std::size_t k = 0; k < depth; k += 2)
            for (std::size_t c = 0; c < kPanelColumns; ++c) {
                const std::size_t column = panel * kPanelColumns + c;
                *panels++ = column < columns ? weight[column * depth + k] : std::uint16_t{0};
                *panels++ = column < columns ? weight[column * depth + k + 1] : std::uint16_t{0};
            }
}

}  // namespace tsqp
