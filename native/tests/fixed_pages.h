// The fixed pages of an arena, and no byte more: an address past them is one that ASan reports.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

#include "border/layout.h"

namespace tsqp {

class FixedPages {
  public:
    FixedPages()
        : base_(static_cast<std::byte*>(::operator new(kSlotsOffset, std::align_val_t{kPageBytes}))) {
        std::memset(base_, 0, kSlotsOffset);
    }
    ~FixedPages() { ::operator delete(base_, std::align_val_t{kPageBytes}); }
    FixedPages(const FixedPages&) = delete;
    FixedPages& operator=(const FixedPages&) = delete;
    std::byte* base() const { return base_; }

  private:
    std::byte* base_;
};

}  // namespace tsqp
