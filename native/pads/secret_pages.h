// Private memory for secrets: locked, so that it is never swapped; left out of cores; zeros in a forked
// child; wiped before it is given back.
#pragma once

#include <cstddef>

namespace tsqp {

class SecretPages {
  public:
    // Zeros. Raises system_error where this cannot be had, with what would be needed.
    explicit SecretPages(std::size_t size_bytes);
    ~SecretPages();
    SecretPages(const SecretPages&) = delete;
    SecretPages& operator=(const SecretPages&) = delete;

    std::byte* data() const { return base_; }
    std::size_t size_bytes() const { return size_bytes_; }

  private:
    std::byte* base_;
    std::size_t size_bytes_;
};

}  // namespace tsqp
