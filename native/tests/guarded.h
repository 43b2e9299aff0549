// An array whose last element is the last before an unreadable page: one element too far is a crash.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

namespace tsqp {

template <class T>
class Guarded {
  public:
    explicit Guarded(std::size_t size) : size_(size) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t used = (size * sizeof(T) + page - 1) / page * page;
        mapped_bytes_ = used + page;
        void* base = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(static_cast<std::byte*>(base) + used, page, PROT_NONE) != 0)
            throw std::bad_alloc();
        base_ = static_cast<std::byte*>(base);
        data_ = reinterpret_cast<T*>(base_ + used - size * sizeof(T));
    }
    ~Guarded() { munmap(base_, mapped_bytes_); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    T* data() { return data_; }
    T* begin() { return data_; }
    T* end() { return data_ + size_; }
    std::size_t size() const { return size_; }
    T& operator[](std::size_t i) { return data_[i]; }

  private:
    std::byte* base_;
    std::size_t mapped_bytes_;
    T* data_;
    std::size_t size_;
};

}  // namespace tsqp
