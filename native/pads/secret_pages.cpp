#include "pads/secret_pages.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "pads/wipe.h"

namespace tsqp {
namespace {

std::size_t whole_pages(std::size_t size_bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return (size_bytes + page - 1) / page * page;
}

std::string limit() {
    rlimit limit{};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    return limit.rlim_cur == RLIM_INFINITY ? "unlimited" : std::to_string(limit.rlim_cur / 1024) + " KiB";
}

[[noreturn]] void fail(int error, const std::string& what) {
    throw std::system_error(error, std::generic_category(), what);
}

}  // namespace

SecretPages::SecretPages(std::size_t size_bytes) : size_bytes_(whole_pages(size_bytes)) {
    const std::string size = std::to_string(size_bytes_ / 1024) + " KiB of memory for keys";
    void* const base = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) fail(errno, size);
    base_ = static_cast<std::byte*>(base);
    const auto require = [&](bool done, const std::string& what) {
        if (done) return;
        const int error = errno;
        munmap(base_, size_bytes_);
        fail(error, size + ": " + what);
    };
    require(madvise(base_, size_bytes_, MADV_DONTDUMP) == 0, "cannot be left out of cores");
    require(madvise(base_, size_bytes_, MADV_WIPEONFORK) == 0,
            "cannot be wiped in a forked child (Linux 4.14)");
    require(mlock(base_, size_bytes_) == 0,
            "cannot be locked; the limit (ulimit -l) is " + limit() + ", less what is locked already");
}

SecretPages::~SecretPages() {
    wipe(base_, size_bytes_);
    munmap(base_, size_bytes_);
}

}  // namespace tsqp
