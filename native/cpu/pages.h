// Zeroed private memory straight from the kernel: page-aligned, free until touched, and on large pages where
// it may be.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <new>
#include <utility>

namespace tsqp {

template <class T>
class Pages {
  public:
    Pages() = default;
    // `dense`: all of it will be used, so large pages waste nothing and save the processor's address tables.
    Pages(std::size_t elements, bool dense) : size_bytes_(elements * sizeof(T)) {
        if (size_bytes_ == 0) return;
        base_ = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base_ == MAP_FAILED) {
            base_ = nullptr;
            throw std::bad_alloc();
        }
        if (dense) madvise(base_, size_bytes_, MADV_HUGEPAGE);
    }
    Pages(Pages&& other) noexcept { *this = std::move(other); }
    Pages& operator=(Pages&& other) noexcept {
        std::swap(base_, other.base_);
        std::swap(size_bytes_, other.size_bytes_);
        return *this;
    }
    ~Pages() {
        if (base_ != nullptr) munmap(base_, size_bytes_);
    }

    // Has the system keep the pages in memory, those that are not touched yet as soon as they are. Returns 0, or
    // why it does not: all count towards the limit at once.
    int lock() const {
        return size_bytes_ == 0 || mlock2(base_, size_bytes_, MLOCK_ONFAULT) == 0 ? 0 : errno;
    }

    // Neither a core file nor a forked child gets it: for what a secret could be told from. Where the system
    // refuses, they do.
    Pages withheld() && {
        if (base_ != nullptr) {
            madvise(base_, size_bytes_, MADV_DONTDUMP);
            madvise(base_, size_bytes_, MADV_WIPEONFORK);
        }
        return std::move(*this);
    }

    T* data() const { return static_cast<T*>(base_); }
    std::size_t size() const { return size_bytes_ / sizeof(T); }

  private:
    void* base_ = nullptr;
    std::size_t size_bytes_ = 0;
};

}  // namespace tsqp
