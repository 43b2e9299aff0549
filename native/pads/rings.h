// The memory of a stock: a ring of rows for each Linear.
//
// Private pages that neither a core file nor a forked child gets, and that lie in the machine's memory only,
// where they could be locked.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace tsqp {

// What a stock has to know of a Linear.
struct StockedLinear {
    std::size_t outputs;
    std::uint64_t fingerprint;  // FieldWeights::fingerprint
};

class PadRings {
  public:
    // Throws bad_alloc.
    PadRings(const std::vector<StockedLinear>& linears, std::size_t capacity_rows, bool lock)
        : size_bytes_(kHeadBytes) {
        for (const StockedLinear& linear : linears) {
            std::size_t ring_bytes;
            first_bytes_.push_back(size_bytes_);
            if (__builtin_mul_overflow(linear.outputs * sizeof(std::uint32_t), capacity_rows, &ring_bytes) ||
                __builtin_add_overflow(size_bytes_, (ring_bytes + kLine - 1) / kLine * kLine, &size_bytes_))
                throw std::bad_alloc();
        }
        void* const base = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<std::byte*>(base);
        madvise(base_, size_bytes_, MADV_HUGEPAGE);
        if (madvise(base_, size_bytes_, MADV_DONTDUMP) != 0 ||
            madvise(base_, size_bytes_, MADV_WIPEONFORK) != 0) {
            munmap(base_, size_bytes_);
            throw std::bad_alloc();
        }
        is_locked_ = lock && mlock(base_, size_bytes_) == 0;
        here().store(kHere, std::memory_order_relaxed);
    }
    ~PadRings() { munmap(base_, size_bytes_); }
    PadRings(const PadRings&) = delete;
    PadRings& operator=(const PadRings&) = delete;

    std::uint32_t* ring(std::size_t linear) const {
        return reinterpret_cast<std::uint32_t*>(base_ + first_bytes_[linear]);
    }
    std::size_t num_bytes() const { return size_bytes_; }
    bool is_locked() const { return is_locked_; }
    // Gives the rings' memory back to the system; they are zeros then.
    void give_up() {
        if (is_locked_) munlock(base_ + kHeadBytes, size_bytes_ - kHeadBytes);
        madvise(base_ + kHeadBytes, size_bytes_ - kHeadBytes, MADV_DONTNEED);
    }
    // Not in a forked child, where all of it is zeros, this word too.
    bool is_of_this_process() const { return here().load(std::memory_order_relaxed) == kHere; }

  private:
    static constexpr std::size_t kHeadBytes = 4096, kLine = 64;
    static constexpr std::uint32_t kHere = 1;
    std::atomic<std::uint32_t>& here() const { return *reinterpret_cast<std::atomic<std::uint32_t>*>(base_); }

    std::size_t size_bytes_;
    std::vector<std::size_t> first_bytes_;  // of each ring
    std::byte* base_ = nullptr;
    bool is_locked_ = false;
};

}  // namespace tsqp
