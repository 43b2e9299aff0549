// The threads of a stock, from their start to their end: which rows they make next, and what they sleep on.

#include <pthread.h>
#include <sched.h>

#include <csignal>
#include <exception>
#include <utility>

#include "border/signal_mask.h"
#include "pads/stock.h"

namespace tsqp {
namespace {

// To run when nobody else wants the core, or as others do. Best effort: a thread that may not is a thread like
// any other.
void schedule(pthread_t thread, int policy) {
    const sched_param none{};
    pthread_setschedparam(thread, policy, &none);
}

}  // namespace

void PadStock::start_makers(std::size_t num_threads) {
    // Signals are for the interpreter's threads: only there do they interrupt a blocked system call.
    const sigset_t blocked = all_signals_but_faults();
    sigset_t before;
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    try {
        for (std::size_t i = 0; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        close();
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// The Linear with the fewest rows, one that somebody waits for before all others.
std::optional<PadStock::Batch> PadStock::claim_batch() {
    for (;;) {
        std::optional<Batch> found;
        bool is_found_wanted = false;
        std::size_t fewest = 0;
        for (std::size_t linear = 0; linear < num_linears(); ++linear) {
            const Ring& ring = ring_[linear];
            if (ring.is_being_made.load(std::memory_order_relaxed)) continue;
            const std::size_t rows = rows_to_make(ring), there = ready(ring);
            if (rows == 0) continue;
            const bool is_wanted = there < ring.wanted.load(std::memory_order_acquire);
            if (found && (is_wanted != is_found_wanted ? is_found_wanted : fewest <= there)) continue;
            found = {.linear = linear, .first = 0, .rows = 0};
            fewest = there;
            is_found_wanted = is_wanted;
        }
        if (!found) return std::nullopt;
        Ring& ring = ring_[found->linear];
        // SYNC POINT: acquire; pairs with the release store in make_batches: the last maker's rows are counted.
        if (ring.is_being_made.exchange(true, std::memory_order_acquire)) continue;
        // Asked again: between the first look and the claim another maker may have made these rows.
        found->first = ring.made.load(std::memory_order_acquire);
        found->rows = rows_to_make(ring);
        if (found->rows > 0) return found;
        ring.is_being_made.store(false, std::memory_order_release);
    }
}

void PadStock::serve() {
    schedule(pthread_self(), SCHED_IDLE);
    try {
        make_batches();
    } catch (const std::exception& error) {
        end_with(error.what());
    } catch (...) {
        end_with("of something that is no error");
    }
}

void PadStock::make_batches() {
    for (;;) {
        const std::uint32_t bell = bell_.load(std::memory_order_acquire);
        if (is_ending_.load(std::memory_order_acquire)) return;
        const std::optional<Batch> batch = claim_batch();
        if (!batch) {
            bell_.wait(bell, std::memory_order_acquire);
            continue;
        }
        rest_.look();
        Ring& ring = ring_[batch->linear];
        maker_->make(batch->linear, batch->first, batch->rows, row(batch->linear, batch->first), rest_);
        num_made_.fetch_add(batch->rows, std::memory_order_relaxed);
        // SYNC POINT: release; pairs with the acquire load in ready.
        ring.made.store(batch->first + batch->rows, std::memory_order_release);
        // SYNC POINT: release; pairs with the exchange in claim_batch.
        ring.is_being_made.store(false, std::memory_order_release);
        tell_waiting();
    }
}

void PadStock::end_with(const char* fault) {
    if (!has_fault_.exchange(true, std::memory_order_relaxed)) {
        fault_ = fault;
        // SYNC POINT: release; pairs with the acquire load in fault.
        fault_is_told_.store(true, std::memory_order_release);
    }
    is_ending_.store(true, std::memory_order_seq_cst);
    rest_.ask(false);
    ring_bell();
    tell_waiting();
}

void PadStock::close() {
    if (is_closed_.exchange(true, std::memory_order_relaxed)) return;
    if (!is_of_this_process()) {
        // The threads did not survive the fork: they can neither be joined nor let go, and are left behind.
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    is_ending_.store(true, std::memory_order_seq_cst);
    rest_.ask(false);
    ring_bell();
    tell_waiting();
    // Who waits for them now wants the core for them.
    for (std::thread& thread : threads_) schedule(thread.native_handle(), SCHED_OTHER);
    for (std::thread& thread : threads_) thread.join();
    give_up_when_all_is_back();
}

}  // namespace tsqp
