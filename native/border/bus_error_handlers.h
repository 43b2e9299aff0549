// The handlers that others have for SIGBUS, beside the one of arena_guard.cpp: what a fault elsewhere goes
// to.
//
// A program that embeds this one has its own (faulthandler, a crash reporter), and may install or remove it
// at any moment. So the own one looks whether it is still there whenever a guard is asked to, takes its place
// again, and passes on what is not an arena's.
#pragma once

#include <signal.h>

namespace tsqp {

using BusErrorHandler = void (*)(int, siginfo_t*, void*);

// Puts `own` in the place of whatever handler there is, which is told from then on. Costs one system call
// where it is there already. Not to be called by two threads at once.
// Raises std::runtime_error where the system refuses.
void install_bus_error_handler(BusErrorHandler own);

// Puts the handler back that was there before. One that is not the last any more stays, and passes on:
// another may have kept it as the one before itself.
void remove_bus_error_handler(BusErrorHandler own);

// SAFETY: for signal handlers, so nothing in it locks or allocates. Tells the others of a signal that is
// theirs.
void pass_bus_error_on(int number, siginfo_t* info, void* context);

}  // namespace tsqp
