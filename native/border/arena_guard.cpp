#include "border/arena_guard.h"

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <stdexcept>

#include "border/bus_error_handlers.h"

namespace tsqp {
namespace {

// What the handler may read at any moment, so atomics only. `base` is 0 where there is no arena.
struct Guarded {
    std::atomic<std::uintptr_t> base{0};
    std::atomic<std::size_t> size_bytes{0};
    std::atomic<bool> lost{false};
};

constexpr std::size_t kMaxArenas = 64;
std::array<Guarded, kMaxArenas> arenas;
std::mutex registering;

Guarded* guarded_at(std::uintptr_t address) {
    for (Guarded& arena : arenas) {
        const std::uintptr_t base = arena.base.load(std::memory_order_acquire);
        if (base != 0 && address >= base && address - base < arena.size_bytes.load(std::memory_order_relaxed))
            return &arena;
    }
    return nullptr;
}

// SAFETY: runs in a signal handler, so nothing here locks or allocates; mmap is a bare system call.
void on_bus_error(int number, siginfo_t* info, void* context) {
    const int error_before = errno;
    // Other codes are memory that is broken, or a signal that somebody sent.
    Guarded* arena =
        info->si_code == BUS_ADRERR ? guarded_at(reinterpret_cast<std::uintptr_t>(info->si_addr)) : nullptr;
    // Two threads may fault at once: the second one comes back until the first has laid the pages.
    bool handled = arena != nullptr && arena->lost.exchange(true);
    if (arena != nullptr && !handled) {
        void* base = reinterpret_cast<void*>(arena->base.load(std::memory_order_relaxed));
        handled = mmap(base, arena->size_bytes.load(std::memory_order_relaxed), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
        // The fault comes back, and is to be passed on each time: whoever waits for the pages would for ever.
        if (!handled) arena->lost.store(false);
    }
    if (!handled) pass_bus_error_on(number, info, context);
    errno = error_before;
}

}  // namespace

ArenaGuard::ArenaGuard(std::byte* base, std::size_t size_bytes) {
    const std::lock_guard lock(registering);
    while (index_ < kMaxArenas && arenas[index_].base.load(std::memory_order_relaxed) != 0) ++index_;
    if (index_ == kMaxArenas) throw std::runtime_error("too many arenas are mapped at once");
    install_bus_error_handler(on_bus_error);
    arenas[index_].size_bytes.store(size_bytes, std::memory_order_relaxed);
    arenas[index_].lost.store(false, std::memory_order_relaxed);
    // SYNC POINT: release; pairs with the acquire load of base in guarded_at.
    arenas[index_].base.store(reinterpret_cast<std::uintptr_t>(base), std::memory_order_release);
    guarding_ = true;
}

void ArenaGuard::renew() {
    const std::lock_guard lock(registering);
    if (guarding_) install_bus_error_handler(on_bus_error);
}

void ArenaGuard::release() {
    const std::lock_guard lock(registering);
    if (!guarding_) return;
    arenas[index_].base.store(0, std::memory_order_release);
    guarding_ = false;
    for (const Guarded& arena : arenas)
        if (arena.base.load(std::memory_order_relaxed) != 0) return;
    remove_bus_error_handler(on_bus_error);
}

void require_intact(const std::byte* address) {
    const Guarded* arena = guarded_at(reinterpret_cast<std::uintptr_t>(address));
    if (arena != nullptr && arena->lost.load(std::memory_order_acquire))
        throw ArenaLost(arena->size_bytes.load(std::memory_order_relaxed));
}

}  // namespace tsqp
