#include "pads/stock.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <ctime>
#include <exception>
#include <stdexcept>
#include <utility>

#include "border/signal_mask.h"
#include "cpu/thread_pool.h"
#include "pads/rows.h"
#include "pads/wipe.h"

namespace tsqp {
namespace {

// Into how many rows a ring is cut, each made in one batch: of equal size as far as they go, so that the last
// is not a small one, and two at least, so that one can be made while rows of the other are out.
std::size_t rows_of_a_cut(std::size_t capacity, std::size_t batch) {
    const std::size_t cuts = std::max<std::size_t>(2, (capacity + batch - 1) / batch);
    return (capacity + cuts - 1) / cuts;
}

std::size_t require_capacity(std::size_t capacity_rows) {
    if (capacity_rows == 0) throw std::invalid_argument("capacity_rows: got 0, expected 1 at least");
    return capacity_rows;
}

// Sleeps until somebody wakes who sleeps on `word`, which is still `old`, or so long. std::atomic's own wait has
// no end.
void sleep_on(const std::atomic<std::uint32_t>& word, std::uint32_t old, std::chrono::nanoseconds timeout) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    const timespec time{.tv_sec = seconds.count(), .tv_nsec = (timeout - seconds).count()};
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, &time, nullptr, 0);
}

void wake_all_on(const std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// To run when nobody else wants the core, or as others do. Best effort: a thread that may not is a thread like
// any other.
void schedule(pthread_t thread, int policy) {
    const sched_param none{};
    pthread_setschedparam(thread, policy, &none);
}

}  // namespace

PadStock::PadStock(std::shared_ptr<const PadKeys> keys, std::unique_ptr<PadMaker> maker,
                   std::vector<StockedLinear> linears, std::size_t capacity_rows, std::size_t num_threads,
                   bool lock)
    : keys_(std::move(keys)),
      maker_(std::move(maker)),
      linears_(std::move(linears)),
      capacity_(require_capacity(capacity_rows)),
      cut_rows_(rows_of_a_cut(capacity_, maker_->batch_rows())),
      rings_(linears_, capacity_, lock),
      ring_(std::make_unique<Ring[]>(linears_.size())) {
    if (linears_.empty()) throw std::invalid_argument("linears: got none");
    if (num_threads > kMaxThreads)
        throw std::invalid_argument("num_threads: got " + std::to_string(num_threads) + ", expected 0 to " +
                                    std::to_string(kMaxThreads));
    for (std::size_t linear = 0; linear < num_linears(); ++linear) ring_[linear].is_back.resize(capacity_);
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

PadStock::~PadStock() { close(); }

void PadStock::require_this_process() const {
    if (!is_of_this_process())
        throw std::logic_error("pads are of the process that made them, not of one that it forked");
}

PadStock::Ring& PadStock::ring(std::size_t linear) const {
    if (linear >= num_linears())
        throw std::out_of_range("linear " + std::to_string(linear) + " of a stock that has " +
                                std::to_string(num_linears()));
    return ring_[linear];
}

std::size_t PadStock::ready(const Ring& ring) const {
    if (is_ending_.load(std::memory_order_relaxed)) return 0;
    // SYNC POINT: acquire; pairs with the release store in make_batches: who counts a row sees its words.
    return ring.made.load(std::memory_order_acquire) - ring.taken.load(std::memory_order_relaxed);
}

std::shared_ptr<PadRows> PadStock::take(std::size_t linear, std::size_t rows) {
    require_this_process();
    Ring& from = ring(linear);
    if (rows > ready(from)) return nullptr;
    const std::uint64_t first = from.taken.load(std::memory_order_relaxed);
    auto taken = std::make_shared<PadRows>(shared_from_this(), linear, first, rows);
    from.taken.store(first + rows, std::memory_order_relaxed);
    return taken;
}

bool PadStock::wait(std::size_t linear, std::size_t rows, std::chrono::nanoseconds timeout) {
    require_this_process();
    Ring& from = ring(linear);
    const auto end = std::chrono::steady_clock::now() + timeout;
    bool is_told = false, are_resting = false;
    for (;;) {
        const std::uint32_t progress = progress_.load(std::memory_order_acquire);
        const bool is_there = rows <= ready(from);
        const auto left = end - std::chrono::steady_clock::now();
        if (is_there || rows > capacity_ || is_ending_.load(std::memory_order_acquire) ||
            left <= std::chrono::nanoseconds::zero()) {
            from.wanted.store(0, std::memory_order_relaxed);
            if (are_resting) rest(true);
            return is_there && !is_ending_.load(std::memory_order_acquire);
        }
        if (!std::exchange(is_told, true)) {
            from.wanted.store(rows, std::memory_order_release);
            are_resting = rest_.ask(false);
            ring_bell();
        }
        sleep_on(progress_, progress, left);
    }
}

void PadStock::rest(bool is_asked) {
    require_this_process();
    rest_.ask(is_asked);
    // Who ends it may have looked before: a maker that rests would not end.
    if (is_ending_.load(std::memory_order_seq_cst)) rest_.ask(false);
}

std::size_t PadStock::available_of(std::size_t linear) const {
    require_this_process();
    return ready(ring(linear));
}

std::size_t PadStock::available() const {
    require_this_process();
    std::size_t fewest = capacity_;
    for (std::size_t linear = 0; linear < num_linears(); ++linear)
        fewest = std::min(fewest, ready(ring_[linear]));
    return fewest;
}

PadCounts PadStock::counts() const {
    return {num_made_.load(std::memory_order_relaxed), num_used_.load(std::memory_order_relaxed),
            num_burned_.load(std::memory_order_relaxed)};
}

std::optional<std::string> PadStock::fault() const {
    if (!fault_is_told_.load(std::memory_order_acquire)) return std::nullopt;
    return fault_;
}

void PadStock::give_back(std::size_t linear, std::uint64_t first, std::size_t rows, std::size_t burned) {
    // A forked child has nothing to give: what it holds are zeros, and the slots are its parent's.
    if (!is_of_this_process()) return;
    Ring& to = ring_[linear];
    num_burned_.fetch_add(burned, std::memory_order_relaxed);
    for (std::uint64_t row = first; row < first + rows; ++row) {
        // With the result that was made with it, it is the product of what was blinded.
        wipe(this->row(linear, row), linears_[linear].outputs * sizeof(std::uint32_t));
        to.is_back[row % capacity_] = true;
    }
    std::uint64_t freed = to.freed.load(std::memory_order_relaxed);
    for (; to.is_back[freed % capacity_]; ++freed) to.is_back[freed % capacity_] = false;
    // SYNC POINT: release; pairs with the acquire load in rows_to_make: a slot is free once it was wiped.
    to.freed.store(freed, std::memory_order_release);
    if (is_closed_.load(std::memory_order_relaxed))
        give_up_when_all_is_back();
    else if (rows_to_make(to) > 0)
        ring_bell();
}

void PadStock::give_up_when_all_is_back() {
    for (std::size_t linear = 0; linear < num_linears(); ++linear)
        if (ring_[linear].freed.load(std::memory_order_relaxed) !=
            ring_[linear].taken.load(std::memory_order_relaxed))
            return;
    rings_.give_up();
}

// Of the batch that comes next: to the end of its cut, or as far as there are slots where somebody waits; 0
// where it has to wait for slots.
std::size_t PadStock::rows_to_make(const Ring& ring) const {
    const std::uint64_t made = ring.made.load(std::memory_order_acquire);
    const std::size_t free = capacity_ - (made - ring.freed.load(std::memory_order_acquire));
    const std::size_t slot = made % capacity_,
                      rows = std::min(cut_rows_ - slot % cut_rows_, capacity_ - slot);
    if (free >= rows) return rows;
    return ready(ring) < ring.wanted.load(std::memory_order_acquire) ? free : 0;
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
    is_ending_.store(true, std::memory_order_release);
    rest_.ask(false);
    ring_bell();
    tell_waiting();
}

void PadStock::ring_bell() {
    // SYNC POINT: release; pairs with the acquire load in make_batches: who has seen this sees the reason too.
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
}

void PadStock::tell_waiting() {
    // SYNC POINT: release; pairs with the acquire load in wait.
    progress_.fetch_add(1, std::memory_order_release);
    wake_all_on(progress_);
}

void PadStock::close() {
    if (is_closed_.exchange(true, std::memory_order_relaxed)) return;
    if (!is_of_this_process()) {
        // The threads did not survive the fork: they can neither be joined nor let go, and are left behind.
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    is_ending_.store(true, std::memory_order_release);
    rest_.ask(false);
    ring_bell();
    tell_waiting();
    // Who waits for them now wants the core for them.
    for (std::thread& thread : threads_) schedule(thread.native_handle(), SCHED_OTHER);
    for (std::thread& thread : threads_) thread.join();
    give_up_when_all_is_back();
}

void PadRows::spend() {
    stock_->require_this_process();
    if (std::exchange(is_spent_, true))
        throw std::invalid_argument("pads: rows [" + std::to_string(first_row_) + ", +" +
                                    std::to_string(rows_) + ") of Linear " + std::to_string(linear_) +
                                    " have blinded something");
}

}  // namespace tsqp
