// Keeps this process alive when somebody takes the arena's pages away.
//
// Whoever may write to a POSIX shared-memory object may also truncate it or punch a hole into it, and the
// next touch of a page that is gone ends the toucher with SIGBUS. A handler lays private zero pages over the
// whole arena instead, so that every thread goes on and touches nothing but them, and notes that the arena is
// lost; whatever uses it next raises. (A sealed memfd cannot be truncated, but it has no name that an
// enclave's manifest could list.)
#pragma once

#include <cstddef>
#include <stdexcept>

namespace tsqp {

// Somebody took the arena's pages away.
struct ArenaLost : std::runtime_error {
    explicit ArenaLost(std::size_t size) : std::runtime_error("arena"), size_bytes(size) {}
    std::size_t size_bytes;
};

// Guards one mapping while it lives. The handler is this process's, and others may have theirs
// (bus_error_handlers.h): each guard puts it where it belongs at the beginning and when it is renewed, and
// the last one that ends takes it away.
class ArenaGuard {
  public:
    // SAFETY: [base, base + size_bytes) is one shared mapping, which stays until release().
    ArenaGuard(std::byte* base, std::size_t size_bytes);
    ~ArenaGuard() { release(); }
    ArenaGuard(const ArenaGuard&) = delete;
    ArenaGuard& operator=(const ArenaGuard&) = delete;

    // Takes the handler's place again where somebody has put another there. Costs a system call where nobody
    // has.
    void renew();

    // Lets go of the mapping. A second time does nothing.
    void release();

  private:
    std::size_t index_ = 0;
    bool guarding_ = false;
};

// Raises ArenaLost if the guarded arena that holds `address` was lost.
void require_intact(const std::byte* address);

}  // namespace tsqp
