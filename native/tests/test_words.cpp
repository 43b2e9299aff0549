// Every access of a kernel to a slot begins at a word: the slot's pages are protected, each access faults,
// its address is looked at, and the one instruction goes on with the pages open.

#if defined(__x86_64__) && defined(__linux__)

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "border/words.h"
#include "check.h"
#include "field/check.h"
#include "kernels/dispatch.h"
#include "kernels/finite.h"
#include "kernels/kernels.h"
#include "pads/pad_kernels.h"

using namespace tsqp;

namespace {

constexpr std::size_t kSlotBytes = 1 << 16;
constexpr greg_t kTrapFlag = 0x100;

// Signal handlers get no context of their own.
std::byte* slot = nullptr;
volatile std::size_t accesses = 0, misaligned = 0;

void protect(int protection) {
    if (mprotect(slot, kSlotBytes, protection) != 0) std::abort();
}

void on_fault(int, siginfo_t* info, void* context) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    const auto first = reinterpret_cast<std::uintptr_t>(slot);
    if (address < first || address >= first + kSlotBytes) std::abort();
    accesses = accesses + 1;
    if (!is_whole_words(address - first)) misaligned = misaligned + 1;
    protect(PROT_READ | PROT_WRITE);
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] |= kTrapFlag;
}

void on_step(int, siginfo_t*, void* context) {
    protect(PROT_NONE);
    static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
}

void handle(int signal, void (*handler)(int, siginfo_t*, void*)) {
    struct sigaction action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO;
    if (sigaction(signal, &action, nullptr) != 0) std::abort();
}

template <class Act>
void watch(const char* name, const Act& act) {
    accesses = 0;
    misaligned = 0;
    protect(PROT_NONE);
    act();
    protect(PROT_READ | PROT_WRITE);
    if (misaligned != 0)
        std::printf("%s: %zu of %zu accesses begin inside a word\n", name, misaligned, accesses);
    CHECK(accesses > 0 && misaligned == 0);
}

template <class E>
void test_table(const ElementKernels& kernels) {
    auto* const elements = reinterpret_cast<E*>(slot);
    for (const std::size_t width : {4, 12, 20, 36, 100}) {
        std::vector<float> residual(3 * width, 1), weight(width, 1);
        const AddRmsNormArgs norm{elements, elements + 4 * width, residual.data(), nullptr,
                                  0,        weight.data(),        width,           1e-5f};
        watch("add_rms_norm", [&] { kernels.add_rms_norm(norm, 0, 3); });
        const SiluMulArgs silu{elements, elements + 8 * width, width};
        watch("silu_mul", [&] { kernels.silu_mul(silu, 0, 3); });
        const std::int32_t positions[] = {0, 1, 0};
        std::vector<float> cos(width), sin(width), scratch(width);
        const RopeArgs rope{elements, positions, cos.data(), sin.data(), 2, width, 2 * width};
        watch("rope", [&] { kernels.rope(rope, scratch.data(), 0, 3); });
    }
    for (const std::size_t count : {1, 2, 3, 15, 17, 30, 37}) {
        std::vector<float> values(count, 1);
        watch("load", [&] { kernels.load({elements, values.data()}, 0, count); });
        watch("store", [&] { kernels.store({values.data(), elements}, 0, count); });
    }
    const std::size_t columns = 112;
    std::vector<float> scratch(columns);
    for (const std::size_t window : {0, 1, 37})
        for (std::size_t end = 0; end <= columns; end += 7) {
            const SoftmaxArgs args{elements, 3, columns, 1.0f, end, window};
            watch("softmax", [&] { kernels.softmax(args, scratch.data(), 0, 3); });
        }
}

void test_check(const CheckKernels& kernels) {
    auto* const words = reinterpret_cast<std::uint32_t*>(slot);
    for (const std::size_t width : {2, 6, 36, 100, 514}) {
        std::vector<float> weight(width * width, 1), x(3 * width, 1), out(3 * width), scales(3);
        FieldWeights weights(width, width);
        weights.set_rows(kScalarField, 0, width, weight.data());
        std::vector<std::uint32_t> vectors(2 * width, 1), sums(6), copy(3 * width);
        const FieldCheck check(kernels, weights, vectors.data(), 2);
        watch("begin", [&] {
            check.begin(kScalarField, kernels, x.data(), 3, words, scales.data(), sums.data(), nullptr);
        });
        watch("finish",
              [&] { check.finish(kernels, words, 3, scales.data(), sums.data(), out.data(), nullptr); });
        watch("finish with a copy",
              [&] { check.finish(kernels, words, 3, scales.data(), sums.data(), out.data(), copy.data()); });
        const std::vector<std::uint32_t> products(out.size(), 5);
        const std::uint32_t* const pads[] = {products.data(), products.data(), products.data()};
        watch("check, finish with pads", [&] {
            check.finish(kernels, words, 3, scales.data(), sums.data(), out.data(), nullptr, pads);
        });
    }
    // Rows of an odd width, as logits may be: the second begins inside a word.
    FieldWeights weights(37, 2);
    std::vector<std::uint32_t> vectors(37, 1), sums(3);
    std::vector<float> scales(3, 1), out(3 * 37);
    const FieldCheck check(kernels, weights, vectors.data(), 1);
    watch("finish of odd rows",
          [&] { check.finish(kernels, words, 3, scales.data(), sums.data(), out.data(), nullptr); });
}

// Behind each row a word that it may not write.
void test_masks(const PadKernels& kernels) {
    auto* const words = reinterpret_cast<std::uint32_t*>(slot);
    const std::uint8_t key[kAesKeyBytes] = {1};
    AesSchedule schedule;
    expand_key(key, schedule);
    for (const std::size_t inputs : {2, 4, 6, 14, 16, 30, 66, 146, 514}) {
        std::vector<std::int32_t> integers(inputs);
        const MaskArgs args{.inputs = inputs, .integers = integers.data(), .m = words, .copy = nullptr};
        words[inputs] = 7;
        watch("mask", [&] { kernels.mask({&schedule, 3}, args); });
        CHECK(words[inputs] == 7);
    }
}

}  // namespace

int main() {
    slot = static_cast<std::byte*>(
        mmap(nullptr, kSlotBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (slot == MAP_FAILED) std::abort();
    handle(SIGSEGV, on_fault);
    handle(SIGTRAP, on_step);
    for (const KernelTable* table : supported_kernels()) {
        std::printf("words: %s\n", table->name);
        test_table<std::uint16_t>(table->bf16);
        test_table<float>(table->f32);
    }
    for (const CheckKernels* kernels : supported_check_kernels()) {
        std::printf("words of checks: %s\n", kernels->name);
        test_check(*kernels);
    }
    for (const PadKernels* kernels : supported_pad_kernels()) {
        std::printf("words of masks: %s\n", kernels->name);
        test_masks(*kernels);
    }
    const auto* bits = reinterpret_cast<const std::uint16_t*>(slot);
    watch("are_finite", [&] { are_finite(bits, 517, kBf16Exponent); });
}

#else
int main() {}
#endif
