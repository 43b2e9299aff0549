#include "pads/stock.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <stdexcept>
#include <utility>

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
    start_makers(num_threads);
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
    // SYNC POINT: acquire; pairs with the release store in take. First what is taken: of what is made no less is
    // seen then.
    const std::uint64_t taken = ring.taken.load(std::memory_order_acquire);
    // SYNC POINT: acquire; pairs with the release store in make_batches: who counts a row sees its words.
    return ring.made.load(std::memory_order_acquire) - taken;
}

std::shared_ptr<PadRows> PadStock::take(std::size_t linear, std::size_t rows) {
    require_this_process();
    Ring& from = ring(linear);
    if (rows > ready(from)) return nullptr;
    const std::uint64_t first = from.taken.load(std::memory_order_relaxed);
    auto taken = std::make_shared<PadRows>(shared_from_this(), linear, first, rows);
    // SYNC POINT: release; pairs with the acquire load in ready.
    from.taken.store(first + rows, std::memory_order_release);
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

void PadRows::spend() {
    stock_->require_this_process();
    if (std::exchange(is_spent_, true))
        throw std::invalid_argument("pads: rows [" + std::to_string(first_row_) + ", +" +
                                    std::to_string(rows_) + ") of Linear " + std::to_string(linear_) +
                                    " have blinded something");
}

}  // namespace tsqp
