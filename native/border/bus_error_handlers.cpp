#include "border/bus_error_handlers.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

namespace tsqp {
namespace {

using Action = struct sigaction;

// Oldest first. A handler reads them while `num_others` says so; whoever changes them sets it to 0 meanwhile:
// a fault at that very moment ends the process, as such a fault does.
constexpr std::size_t kMaxOthers = 8;
std::array<Action, kMaxOthers> others;
std::atomic<std::size_t> num_others{0};

// Of a signal that comes again to a thread, how many have been told already: it was theirs, and they did not
// mend it. Each thread has its own, as another's fault in between is no new beginning.
// SAFETY: "initial-exec", or the first use in a thread would allocate, in a signal handler.
struct Told {
    std::size_t count = 0;
    void* of = nullptr;
    bool is_raised_again = false;
};
[[gnu::tls_model("initial-exec")]] constinit thread_local Told told;

// SAFETY: sa_handler and sa_sigaction are one word.
bool is_same(const Action& one, const Action& other) { return one.sa_sigaction == other.sa_sigaction; }

bool is_own(const Action& action, BusErrorHandler own) { return action.sa_sigaction == own; }

void add(const Action& action) {
    std::size_t count = num_others.exchange(0);
    const auto end = others.begin() + static_cast<std::ptrdiff_t>(count);
    const auto same =
        std::find_if(others.begin(), end, [&](const Action& other) { return is_same(other, action); });
    // Each stands there once, and the oldest makes room.
    if (same != end || count == kMaxOthers) {
        std::move(same != end ? same + 1 : others.begin() + 1, end, same != end ? same : others.begin());
        --count;
    }
    others[count] = action;
    num_others.store(count + 1);
}

void take_default_action(const siginfo_t* info) {
    Action action{};
    action.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &action, nullptr);
    // A fault comes back by itself; a signal that somebody sent does not.
    if (info->si_code <= 0) raise(SIGBUS);
}

}  // namespace

void install_bus_error_handler(BusErrorHandler own) {
    Action before{};
    if (sigaction(SIGBUS, nullptr, &before) == 0 && is_own(before, own)) return;
    Action handler{};
    handler.sa_sigaction = own;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&handler.sa_mask);
    if (sigaction(SIGBUS, &handler, &before) != 0)
        throw std::runtime_error("no handler for SIGBUS can be installed");
    if (!is_own(before, own)) add(before);
}

void remove_bus_error_handler(BusErrorHandler own) {
    Action now{};
    // Of several others some may be gone by now, and would not end what comes to them.
    if (num_others.load() != 1 || sigaction(SIGBUS, nullptr, &now) != 0 || !is_own(now, own)) return;
    sigaction(SIGBUS, others.data(), nullptr);
    num_others.store(0);
}

void pass_bus_error_on(int number, siginfo_t* info, void* context) {
    const bool is_fault = info->si_code > 0;
    // A fault that nobody mended comes back by itself. One that tells of a signal and raises it again, as
    // faulthandler does, means the handler before itself; when it is disabled it just returns.
    const bool comes_again = is_fault ? told.of == info->si_addr : told.is_raised_again;
    if (is_fault) told.of = info->si_addr;
    told.is_raised_again = false;
    if (!comes_again) told.count = 0;
    const std::size_t count = num_others.load(), num_told = told.count++;
    if (num_told >= count) return take_default_action(info);
    const Action& other = others[count - 1 - num_told];
    // The kernel lets nobody ignore a fault.
    if (other.sa_handler == SIG_DFL || (other.sa_handler == SIG_IGN && is_fault))
        return take_default_action(info);
    if (other.sa_handler == SIG_IGN) return;
    if ((other.sa_flags & SA_SIGINFO) != 0)
        other.sa_sigaction(number, info, context);
    else
        other.sa_handler(number);
    sigset_t pending;
    told.is_raised_again = sigpending(&pending) == 0 && sigismember(&pending, SIGBUS) == 1;
}

}  // namespace tsqp
