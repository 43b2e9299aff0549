// What the threads of native code leave to the interpreter's: every signal but those that a thread's own
// instruction raises.
#pragma once

#include <signal.h>

namespace tsqp {

// A fault that is blocked where it happens ends the process, whatever handler there is (arena_guard.h has
// one).
inline sigset_t all_signals_but_faults() {
    sigset_t signals;
    sigfillset(&signals);
    for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&signals, fault);
    return signals;
}

}  // namespace tsqp
