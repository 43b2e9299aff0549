// Splits rows of work over a few persistent threads; the calling thread is one of them.
//
// Idle threads sleep in the kernel: the process next door needs the cores. A thread that wakes late finds its
// share taken, so nobody ever waits for a wake-up. One job runs at a time; a caller that finds the pool busy
// runs its job alone. After fork the child has no threads and makes new ones at its first job.
#pragma once

#include <chrono>
#include <cstddef>

namespace tsqp {

inline constexpr std::size_t kMaxThreads = 256;

// Threads that take part in a job, the calling one included; 1 until set. Raises invalid_argument unless
// 1 <= num_threads <= kMaxThreads. Waits for a running job.
//
// An idle thread gives way to others for `patience` before it sleeps in the kernel: a job that comes
// meanwhile finds it awake, which saves the 50 us of a wake-up and costs nobody who wants the processor.
void set_num_threads(std::size_t num_threads, std::chrono::microseconds patience = {});
std::size_t get_num_threads();
// Of those, as many as leave one of the cores that this process may use to another process, the calling one
// at least.
std::size_t num_threads_beside_another();
// One row's product with fewer bytes of weights takes less long than the TEE's thread would sleep through
// (border/service_times.h): that thread stays on its core. One of ours that shared the core would come late,
// or hold it when it is wanted, since giving way gives nothing to a thread of another scheduling group, as
// processes of two sessions or containers are.
inline constexpr std::size_t kShortProductBytes = 8 * 1024 * 1024;

// worker is 0 for the calling thread and below num_workers for every other: an index for private scratch.
using RowFunction = void (*)(const void* context, std::size_t worker, std::size_t begin,
                             std::size_t end) noexcept;

// Calls function on blocks of at most `grain` rows that together cover [0, rows) once, on at most num_workers
// threads, and returns when all are done. Up to two blocks' worth runs on the caller alone: a wake-up costs
// more.
void parallel_rows(std::size_t rows, std::size_t grain, std::size_t num_workers, RowFunction function,
                   const void* context);

// The same for a callable (worker, begin, end), which must not throw.
template <class Body>
void parallel_rows(std::size_t rows, std::size_t grain, std::size_t num_workers, const Body& body) {
    parallel_rows(
        rows, grain, num_workers,
        [](const void* context, std::size_t worker, std::size_t begin, std::size_t end) noexcept {
            (*static_cast<const Body*>(context))(worker, begin, end);
        },
        &body);
}

}  // namespace tsqp
