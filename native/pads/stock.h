// Pads that were made ahead: for each Linear the products rW of its next rows, in a ring, filled by threads
// that run when nobody else wants the core.
//
//     row i at slot i % capacity:   freed <= taken <= made <= freed + capacity
//
//     [freed, taken)   handed out, and not all given back yet; blinded, or about to be
//     [taken, made)    there to be taken
//     [made, ...)      made next, whole cuts of the ring at a time, as soon as its slots are free
//
// Who takes and who makes share no lock: a maker that has lost its core in the middle of a batch holds nobody
// up. One thread takes, waits and gives back, or several one after the other, as those do that hold Python's
// lock.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "pads/keys.h"
#include "pads/maker.h"
#include "pads/rings.h"

namespace tsqp {

class PadRows;

struct PadCounts {
    std::uint64_t made, used, burned;
};

class PadStock : public std::enable_shared_from_this<PadStock> {
  public:
    // `lock`: as far as the system allows. Throws invalid_argument, and bad_alloc or
    // system_error where there is no memory or no thread to be had.
    PadStock(std::shared_ptr<const PadKeys> keys, std::unique_ptr<PadMaker> maker,
             std::vector<StockedLinear> linears, std::size_t capacity_rows, std::size_t num_threads,
             bool lock);
    ~PadStock();
    PadStock(const PadStock&) = delete;
    PadStock& operator=(const PadStock&) = delete;

    // The next rows of a Linear, which nobody is given again; null where there are not so many. What follows
    // throws out_of_range for a Linear that there is not, and logic_error in a forked child.
    std::shared_ptr<PadRows> take(std::size_t linear, std::size_t rows);
    // Whether there are so many by then. Whom it waits for is told, so that they come before all else, and in
    // batches as small as need be.
    bool wait(std::size_t linear, std::size_t rows, std::chrono::nanoseconds timeout);
    // Whether the makers are to rest until they are told otherwise; for somebody who waits they work.
    void rest(bool is_asked);
    std::size_t available_of(std::size_t linear) const;
    // The fewest of any Linear.
    std::size_t available() const;

    const PadKeys& keys() const { return *keys_; }
    std::size_t num_linears() const { return linears_.size(); }
    // FieldWeights::fingerprint of a Linear.
    std::uint64_t fingerprint(std::size_t linear) const { return linears_[linear].fingerprint; }
    std::size_t capacity() const { return capacity_; }
    std::size_t num_bytes() const { return rings_.num_bytes(); }
    bool is_locked() const { return rings_.is_locked(); }
    bool is_of_this_process() const { return rings_.is_of_this_process(); }
    void require_this_process() const;
    PadCounts counts() const;
    // Closed, or its maker is at fault.
    bool is_ending() const { return is_ending_.load(std::memory_order_relaxed); }
    // What a maker has thrown: then there is nothing to be taken any more.
    std::optional<std::string> fault() const;

    // Ends the threads, each when its batch is over; nothing can be taken any more. Rows that are out stay what
    // they are until they are given back, and with the last of them the memory goes back to the system, which
    // clears it. Rows that nobody took have blinded nothing.
    void close();

  private:
    friend PadRows;

    // On lines of its own: makers write what takers only read, and the other way round.
    struct alignas(128) Ring {
        std::atomic<std::uint64_t> made{0};
        std::atomic<bool> is_being_made{false};
        alignas(64) std::atomic<std::uint64_t> taken{0};
        std::atomic<std::uint64_t> freed{0};
        std::atomic<std::uint64_t> wanted{0};  // rows that somebody waits for
        std::vector<bool> is_back;             // of the slots of rows from `freed` on
    };
    struct Batch {
        std::size_t linear;
        std::uint64_t first;
        std::size_t rows;
    };

    std::uint32_t* row(std::size_t linear, std::uint64_t row) const {
        return rings_.ring(linear) + row % capacity_ * linears_[linear].outputs;
    }
    void give_back(std::size_t linear, std::uint64_t first, std::size_t rows, std::size_t burned);
    Ring& ring(std::size_t linear) const;
    std::size_t ready(const Ring& ring) const;
    std::size_t rows_to_make(const Ring& ring) const;
    void start_makers(std::size_t num_threads);
    std::optional<Batch> claim_batch();
    void serve();
    void make_batches();
    void end_with(const char* fault);
    void give_up_when_all_is_back();
    void ring_bell();
    void tell_waiting();

    const std::shared_ptr<const PadKeys> keys_;
    const std::unique_ptr<PadMaker> maker_;
    const std::vector<StockedLinear> linears_;
    const std::size_t capacity_, cut_rows_;
    PadRings rings_;
    const std::unique_ptr<Ring[]> ring_;
    std::atomic<std::uint64_t> num_made_{0}, num_used_{0}, num_burned_{0};
    std::atomic<std::uint32_t> bell_{0};  // one more with each reason to look for work; makers sleep on it
    std::atomic<std::uint32_t> progress_{0};  // one more with each batch and end; who waits sleeps on it
    Rest rest_;
    std::atomic<bool> is_ending_{false}, is_closed_{false};
    std::atomic<bool> has_fault_{false};  // claimed by the first
    std::atomic<bool> fault_is_told_{false};
    std::string fault_;
    std::vector<std::thread> threads_;
};

}  // namespace tsqp
