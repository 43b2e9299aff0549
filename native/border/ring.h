// Single-producer single-consumer rings of 64-byte records in shared memory, and the flag that tells a
// producer whether its consumer sleeps.
//
// Each side keeps its own position privately and only publishes it: a position read from shared memory was
// written by the other side, is checked against the own one, and never used as an address before that check.
//
// No wake-up is lost. The consumer parks with   parked = odd;  fence;  look at tail.
//                     The producer publishes with  tail = n;   fence;  look at parked.
// With sequentially consistent fences at least one of them sees the other's store.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "border/layout.h"

namespace tsqp {

using Record = std::array<std::uint64_t, kRecordBytes / sizeof(std::uint64_t)>;

// A record by words: sequence, epoch, (opcode, target, in_slot, out_slot), (first_row, rows), (first_segment,
// num_segments), (status, reserved), busy_ns, value. shm/protocol.py is the twin; tests/test_submission.py
// compares them.
inline constexpr std::size_t kEchoedWords = 5, kStatusWord = 5, kBusyWord = 6, kValueWord = 7;

// The other side wrote a word that its side of the protocol does not allow.
struct PeerViolation : std::runtime_error {
    PeerViolation(const char* word, std::uint64_t low, std::uint64_t high, std::uint64_t value)
        : std::runtime_error(word), field(word), lowest(low), highest(high), found(value) {}
    const char* field;
    std::uint64_t lowest, highest, found;
};

// How a wait ended; all but the last got a record.
enum class Wait : int { ready, spun, yielded, parked, timeout };

// Where one ring's parts lie, as distances from the arena's base.
struct RingOffsets {
    std::size_t records, tail, head, parked;
};

inline constexpr RingOffsets kSubmissionRing{
    kSubmissionRingOffset,
    kControlOffset + offsetof(Control, submission_tail),
    kControlOffset + offsetof(Control, submission_head),
    kControlOffset + offsetof(Control, submission_parked),
};
inline constexpr RingOffsets kCompletionRing{
    kCompletionRingOffset,
    kControlOffset + offsetof(Control, completion_tail),
    kControlOffset + offsetof(Control, completion_head),
    kControlOffset + offsetof(Control, completion_parked),
};

using SharedWord = std::atomic_ref<std::uint64_t>;
static_assert(SharedWord::is_always_lock_free);

// The mapped words of one ring. SAFETY: base is page aligned and the arena is larger than its fixed pages,
// which the binding checks, so every word is aligned and inside the mapping.
class RingWords {
  public:
    RingWords(std::byte* base, const RingOffsets& at)
        : records_(reinterpret_cast<std::uint64_t*>(base + at.records)),
          tail_(reinterpret_cast<std::uint64_t*>(base + at.tail)),
          head_(reinterpret_cast<std::uint64_t*>(base + at.head)),
          parked_(reinterpret_cast<std::uint64_t*>(base + at.parked)) {}

    SharedWord tail() const { return SharedWord(*tail_); }
    SharedWord head() const { return SharedWord(*head_); }
    SharedWord parked() const { return SharedWord(*parked_); }
    SharedWord word(std::uint64_t position, std::size_t index) const {
        return SharedWord(records_[(position & (kRingDepth - 1)) * (kRecordBytes / 8) + index]);
    }

  private:
    std::uint64_t *records_, *tail_, *head_, *parked_;
};

class RingWriter {
  public:
    RingWriter(std::byte* base, const RingOffsets& at) : words_(base, at) {}

    // Publishes a record. True: the reader has parked since it was last rung, so ring it.
    bool write(const Record& record) {
        // UNTRUSTED: head was written by the reader; it may not lie outside (written - depth, written]. A
        // full ring is its fault too: no more than depth records are ever unanswered, and it takes one before
        // it answers it.
        const std::uint64_t head = words_.head().load(std::memory_order_acquire);
        const std::uint64_t lowest = written_ < kRingDepth ? 0 : written_ - kRingDepth + 1;
        if (head < lowest || head > written_) throw PeerViolation("ring head", lowest, written_, head);
        for (std::size_t i = 0; i < record.size(); ++i)
            words_.word(written_, i).store(record[i], std::memory_order_relaxed);
        ++written_;
        // SYNC POINT: release; pairs with the acquire load of tail in RingReader::available.
        words_.tail().store(written_, std::memory_order_release);
        // SYNC POINT: pairs with the fence in RingReader::park.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        // UNTRUSTED: a wrong flag costs a superfluous or a missing wake-up; a parked reader rechecks by
        // itself.
        const std::uint64_t parked = words_.parked().load(std::memory_order_relaxed);
        const bool ring = (parked & 1) != 0 && parked != rung_;
        if (ring) rung_ = parked;
        return ring;
    }

    std::uint64_t written() const { return written_; }

  private:
    RingWords words_;
    std::uint64_t written_ = 0;
    std::uint64_t rung_ = 0;
};

class RingReader {
  public:
    RingReader(std::byte* base, const RingOffsets& at) : words_(base, at) {}

    bool available() const {
        // UNTRUSTED: tail was written by the writer; it may not lie outside [taken, taken + depth].
        // SYNC POINT: acquire; pairs with the release store of tail in RingWriter::write.
        const std::uint64_t tail = words_.tail().load(std::memory_order_acquire);
        if (tail - taken_ > kRingDepth) throw PeerViolation("ring tail", taken_, taken_ + kRingDepth, tail);
        return tail != taken_;
    }

    // Copies the next record into private memory. The caller has seen available().
    Record take() {
        Record record;
        // UNTRUSTED: each word is copied once; what the copy says is checked by whoever takes it
        // (protocol.py).
        for (std::size_t i = 0; i < record.size(); ++i)
            record[i] = words_.word(taken_, i).load(std::memory_order_relaxed);
        ++taken_;
        words_.head().store(taken_, std::memory_order_release);
        return record;
    }

    // Spins, then yields the processor between looks, for at most the given times.
    Wait wait(std::uint64_t spin_ns, std::uint64_t yield_ns) const;

    // Announces that this side is about to sleep. False: a record came meanwhile, do not sleep.
    bool park() {
        words_.parked().store(++generation_, std::memory_order_relaxed);
        // SYNC POINT: pairs with the fence in RingWriter::write.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!available()) return true;
        unpark();
        return false;
    }

    void unpark() { words_.parked().store(++generation_, std::memory_order_relaxed); }

    std::uint64_t taken() const { return taken_; }

  private:
    RingWords words_;
    std::uint64_t taken_ = 0;
    std::uint64_t generation_ = 0;  // even: awake; odd: parked; each park is a new number, so it is rung once
};

}  // namespace tsqp
