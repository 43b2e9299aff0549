// Submissions in flight, as the side that makes them keeps them: its own copy of each record, never read back
// from the arena, the rows that each lends, and what is learnt and counted when it completes.
//
// The other side executes and completes them in their order. A completion is good if it repeats the first 40
// bytes of the oldest submission and its status says OK; every other one is for whoever catches
// UnexpectedCompletion.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "border/loans.h"
#include "border/ring.h"
#include "border/service_times.h"
#include "border/tallies.h"

namespace tsqp {

inline constexpr std::size_t kNoSlot = 0xFFFF;
// What is asked of the other side. Rows are those of both slots; a score slot is lent as a whole, because
// which of its rows a tile takes follows from its segments.
struct Request {
    std::size_t operation;  // its number in Tallies
    std::uint16_t opcode, target, in_slot, out_slot;
    std::uint32_t first_row, rows, first_segment, num_segments;
    std::uint64_t tile_bytes;  // how much of a score slot the segments take
};

struct LendableSlot {
    std::uint64_t num_rows, row_bytes;
    bool holds_tiles;
};

// A completion that is not OK, or none of the oldest submission at all.
struct UnexpectedCompletion : std::runtime_error {
    UnexpectedCompletion(const Record& of, const Record& found)
        : std::runtime_error("completion"), submitted(of), completed(found) {}
    Record submitted, completed;
};

class Submissions {
  public:
    struct InFlight {
        Record record;
        std::size_t operation = 0, in_slot = kNoSlot, out_slot = kNoSlot;
        std::uint64_t size_bytes = 0, submitted_ns = 0;
        bool alone = false;
    };

    Submissions(std::uint64_t epoch, std::vector<LendableSlot> slots, Loans& loans, Tallies& tallies)
        : epoch_(epoch), slots_(std::move(slots)), loans_(loans), tallies_(tallies) {}

    std::uint64_t submitted() const { return submitted_; }
    std::uint64_t completed() const { return completed_; }
    std::size_t num_in_flight() const { return static_cast<std::size_t>(submitted_ - completed_); }
    bool is_full() const { return num_in_flight() == kRingDepth; }

    // Lends the slots' rows and keeps the record that is to be handed to the other side now.
    const Record& submit(const Request& request, std::uint64_t now_ns) {
        if (is_full()) throw std::length_error("as many submissions are in flight as the ring holds");
        for (const std::size_t slot : {request.in_slot, request.out_slot})
            if (slot != kNoSlot && slot >= slots_.size()) throw std::out_of_range("no such slot");
        if (request.operation >= tallies_.operations.size()) throw std::out_of_range("no such operation");
        InFlight& made = at(submitted_);
        made.alone = num_in_flight() == 0;
        ++submitted_;
        made.record = {
            submitted_,
            epoch_,
            std::uint64_t{request.opcode} | std::uint64_t{request.target} << 16 |
                std::uint64_t{request.in_slot} << 32 | std::uint64_t{request.out_slot} << 48,
            std::uint64_t{request.first_row} | std::uint64_t{request.rows} << 32,
            std::uint64_t{request.first_segment} | std::uint64_t{request.num_segments} << 32,
        };
        made.operation = request.operation;
        made.in_slot = request.in_slot;
        made.out_slot = request.out_slot;
        made.submitted_ns = now_ns;
        const std::uint64_t to_gpu = lend(request.in_slot, request), to_tee = lend(request.out_slot, request);
        made.size_bytes = to_gpu + to_tee;
        tallies_.bytes_to_gpu += to_gpu;
        tallies_.bytes_to_tee += to_tee;
        ++tallies_.doorbells;
        return made.record;
    }

    // The submission whose completion is next. At least one is in flight.
    const InFlight& oldest() const {
        if (num_in_flight() == 0) throw std::logic_error("nothing is in flight");
        return in_flight_[completed_ % kRingDepth];
    }

    // The wait for the oldest begins now, unless it has before. Returns for how long nothing is expected.
    std::uint64_t begin_wait(std::uint64_t now_ns) {
        const InFlight& awaited = oldest();
        if (waiting_since_ns_ == 0) {
            waiting_since_ns_ = looked_ns_ = now_ns;
            nap_ns_ =
                service_times_.nap_ns(awaited.operation, awaited.size_bytes, awaited.submitted_ns, now_ns);
        }
        return nap_ns_;
    }

    // The wait has begun with a nap, and looks from now on.
    void napped(std::uint64_t now_ns) {
        looked_ns_ = now_ns;
        napped_ = true;
    }

    // Takes a completion, for which a wait has begun; its rows are this side's again.
    void complete(const Record& found, std::uint64_t now_ns) {
        const InFlight& awaited = oldest();
        // UNTRUSTED: `found` is a private copy, and may hold anything. Every field that could steer anything
        // must repeat what this side wrote, and the status must be OK, which with `reserved` makes a 0.
        if (!std::equal(found.begin(), found.begin() + kEchoedWords, awaited.record.begin()) ||
            found[kStatusWord] != 0)
            throw UnexpectedCompletion(awaited.record, found);
        const std::uint64_t passed_ns = now_ns - awaited.submitted_ns;
        // UNTRUSTED: a claim; it may not exceed what this side saw pass.
        busy_ns_ = std::min(found[kBusyWord], passed_ns);
        // UNTRUSTED: for display only.
        value_ = found[kValueWord];
        service_times_.completed(awaited.operation, awaited.size_bytes, awaited.submitted_ns, napped_,
                                 looked_ns_, now_ns);
        OperationTally& tally = tallies_.operations[awaited.operation];
        ++tally.calls;
        tally.total_ns += busy_ns_;
        tallies_.waiting_ns += now_ns - waiting_since_ns_;
        if (awaited.alone) tallies_.add_round_trip(passed_ns - busy_ns_);
        for (const std::size_t slot : {awaited.in_slot, awaited.out_slot})
            if (slot != kNoSlot) loans_.take_back();
        ++completed_;
        waiting_since_ns_ = nap_ns_ = 0;
        napped_ = false;
    }

    // What the newest completion adds to its submission: the other side's word, good for display only.
    std::uint64_t busy_ns() const { return busy_ns_; }
    std::uint64_t value() const { return value_; }

  private:
    InFlight& at(std::uint64_t position) { return in_flight_[position % kRingDepth]; }

    // Returns how many bytes the rows take.
    std::uint64_t lend(std::size_t slot, const Request& request) {
        if (slot == kNoSlot) return 0;
        const auto& [num_rows, row_bytes, holds_tiles] = slots_[slot];
        const std::string& operation = tallies_.operations[request.operation].name;
        if (holds_tiles) {
            loans_.lend(slot, 0, num_rows, operation);
            return request.tile_bytes;
        }
        loans_.lend(slot, request.first_row, request.rows, operation);
        return request.rows * row_bytes;
    }

    std::uint64_t epoch_;
    std::vector<LendableSlot> slots_;
    Loans& loans_;
    Tallies& tallies_;
    ServiceTimes service_times_;
    std::array<InFlight, kRingDepth> in_flight_;
    std::uint64_t submitted_ = 0, completed_ = 0;                      // the newest sequence numbers of each
    std::uint64_t waiting_since_ns_ = 0, looked_ns_ = 0, nap_ns_ = 0;  // of the wait for the oldest, or 0
    bool napped_ = false;
    std::uint64_t busy_ns_ = 0, value_ = 0;
};

}  // namespace tsqp
