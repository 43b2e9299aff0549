// Memory of the other side is crossed by whole, aligned 8-byte words, as INTEL-SA-00615 and INTEL-SA-00657
// ask of an enclave: here a word at a time, in the kernels also several at once. What lies in a word beside
// the elements that are wanted is masked after it was read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

inline constexpr std::size_t kWordBytes = sizeof(std::uint64_t);

namespace {  // kernels of several instruction sets compile it: see kernels/lanes.h

inline bool is_whole_words(std::size_t size_bytes) { return size_bytes % kWordBytes == 0; }

// Copies size_bytes into private memory. `from` is aligned and backed up to the end of its last word.
inline void read_words(void* to, const void* from, std::size_t size_bytes) {
    const auto* words = static_cast<const std::uint64_t*>(from);
    auto* bytes = static_cast<unsigned char*>(to);
    for (std::size_t done = 0; done < size_bytes; done += kWordBytes) {
        // UNTRUSTED: an atomic load is what keeps the compiler from cutting a word or reading it a second
        // time.
        const std::uint64_t word = __atomic_load_n(words + done / kWordBytes, __ATOMIC_RELAXED);
        const std::size_t left = size_bytes - done;
        __builtin_memcpy(bytes + done, &word, left < kWordBytes ? left : kWordBytes);
    }
}

// Copies size_bytes from private memory; what is left of the last word becomes 0. `to` as `from` above.
inline void write_words(void* to, const void* from, std::size_t size_bytes) {
    auto* words = static_cast<std::uint64_t*>(to);
    const auto* bytes = static_cast<const unsigned char*>(from);
    for (std::size_t done = 0; done < size_bytes; done += kWordBytes) {
        std::uint64_t word = 0;
        const std::size_t left = size_bytes - done;
        __builtin_memcpy(&word, bytes + done, left < kWordBytes ? left : kWordBytes);
        __atomic_store_n(words + done / kWordBytes, word, __ATOMIC_RELAXED);
    }
}

}  // namespace
}  // namespace tsqp
