#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "border/signal_mask.h"

namespace tsqp {
namespace {

// A few microseconds: long enough for the next kernel of a busy pipeline, too short to take a core from
// anyone.
constexpr int kSpins = 64;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A caller whose last block is still being worked on gives way this long before it sleeps: a block is short.
constexpr std::chrono::microseconds kCallerPatience{200};

// Waits until `word` is no longer `old`: spins, gives way to other threads for `patience`, then sleeps in the
// kernel.
void await_change(const std::atomic<std::uint32_t>& word, std::uint32_t old,
                  std::chrono::microseconds patience) {
    for (int spin = 0; spin < kSpins; ++spin) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    const auto end = std::chrono::steady_clock::now() + patience;
    while (std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
        if (word.load(std::memory_order_acquire) != old) return;
    }
    word.wait(old, std::memory_order_acquire);
}

std::size_t num_cores() {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return kMaxThreads;
    return static_cast<std::size_t>(CPU_COUNT(&allowed));
}

class Pool {
  public:
    Pool(std::size_t num_threads, std::chrono::microseconds patience) : patience_(patience) {
        if (sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) CPU_ZERO(&allowed_);
        // Signals are for the interpreter's threads: only there do they interrupt a blocked system call.
        const sigset_t blocked = all_signals_but_faults();
        sigset_t before;
        pthread_sigmask(SIG_SETMASK, &blocked, &before);
        try {
            for (std::size_t worker = 1; worker < num_threads; ++worker)
                threads_.emplace_back([this, worker] { serve(worker); });
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            stop();
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Pool() { stop(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    void run(std::size_t rows, std::size_t grain, std::size_t num_workers, RowFunction function,
             const void* context) {
        grain = std::max(grain, rows / kClosed + 1);
        const auto blocks = static_cast<std::uint32_t>((rows - 1) / grain + 1);
        const std::uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
        const std::uint64_t first_ticket = std::uint64_t{generation} << 32;
        ticket_.store(first_ticket | kClosed, std::memory_order_relaxed);
        keep_workers_off(sched_getcpu());
        // SYNC POINT: release, each pairs with its acquire load in take_blocks: who sees a new field also
        // sees the ticket closed.
        finished_.store(0, std::memory_order_release);
        rows_.store(rows, std::memory_order_release);
        grain_.store(grain, std::memory_order_release);
        blocks_.store(blocks, std::memory_order_release);
        num_workers_.store(num_workers, std::memory_order_release);
        function_.store(function, std::memory_order_release);
        context_.store(context, std::memory_order_release);
        // SYNC POINT: release; pairs with the acquire load of ticket_ in take_blocks.
        ticket_.store(first_ticket, std::memory_order_release);
        generation_.store(generation, std::memory_order_release);
        generation_.notify_all();
        take_blocks(0);
        // Waits for blocks that others have taken, and are thus working on; never for a thread to wake up.
        for (std::uint32_t done; (done = finished_.load(std::memory_order_acquire)) != blocks;)
            await_change(finished_, done, kCallerPatience);
    }

  private:
    static constexpr std::uint32_t kClosed = UINT32_MAX;

    void stop() {
        stopping_.store(true, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    // Threads that give way to each other all look busy to the scheduler, which may leave the caller and a
    // worker on one core and the peer's process alone on the next: half of the machine's speed, for minutes.
    void keep_workers_off(int cpu) {
        if (cpu < 0 || cpu == caller_cpu_ || !CPU_ISSET(cpu, &allowed_) || CPU_COUNT(&allowed_) < 2) return;
        caller_cpu_ = cpu;
        cpu_set_t others = allowed_;
        CPU_CLR(cpu, &others);
        // Best effort: where it is refused, threads run where they may.
        for (std::thread& thread : threads_)
            pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
    }

    void serve(std::size_t worker) {
        for (std::uint32_t seen = 0;;) {
            await_change(generation_, seen, patience_);
            seen = generation_.load(std::memory_order_acquire);
            if (stopping_.load(std::memory_order_relaxed)) return;
            take_blocks(worker);
        }
    }

    void take_blocks(std::size_t worker) {
        std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const std::size_t rows = rows_.load(std::memory_order_acquire);
            const std::size_t grain = grain_.load(std::memory_order_acquire);
            const std::uint32_t blocks = blocks_.load(std::memory_order_acquire);
            const std::size_t num_workers = num_workers_.load(std::memory_order_acquire);
            const RowFunction function = function_.load(std::memory_order_acquire);
            const void* context = context_.load(std::memory_order_acquire);
            const auto block = static_cast<std::uint32_t>(ticket);
            if (block >= blocks || worker >= num_workers) return;
            // Succeeds only if the ticket is still that of the job whose fields were read: a later job closes
            // the ticket before it changes any field.
            if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                               std::memory_order_acquire))
                continue;
            const std::size_t begin = block * grain;
            function(context, worker, begin, std::min(begin + grain, rows));
            // SYNC POINT: release; pairs with the acquire load of finished_ in run: results are visible to
            // the caller.
            if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == blocks && worker != 0)
                finished_.notify_one();
            // Between two blocks, and not inside one, another process may have the core: the caller waits for
            // blocks.
            if (worker != 0) std::this_thread::yield();
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    const std::chrono::microseconds patience_;
    std::vector<std::thread> threads_;
    cpu_set_t allowed_;    // where this process may run
    int caller_cpu_ = -1;  // where the last job's caller ran, which the workers keep off
    std::atomic<bool> stopping_{false};
    std::atomic<std::uint32_t> generation_{0};  // one more with each job; idle threads sleep on it
    std::atomic<std::uint64_t> ticket_{0};      // generation << 32 | next block
    std::atomic<std::uint32_t> finished_{0};    // blocks done; the caller sleeps on it
    std::atomic<std::size_t> rows_{0}, grain_{0}, num_workers_{0};
    std::atomic<std::uint32_t> blocks_{0};
    std::atomic<RowFunction> function_{nullptr};
    std::atomic<const void*> context_{nullptr};
};

// The process's pool. `busy` guards `pool`; a plain flag, because a forked child must be able to reset it.
struct Shared {
    std::atomic<bool> busy{false};
    std::atomic<std::size_t> num_threads{1};
    std::atomic<std::size_t> cores{1};  // that this process might use when its threads were set
    std::chrono::microseconds patience{0};
    Pool* pool = nullptr;  // made by the first job that wants it

    Shared();
    // At exit: idle threads are woken and joined; `busy` stays set, so a later job runs alone.
    ~Shared() {
        lock();
        delete pool;
    }
    bool try_lock() { return !busy.exchange(true, std::memory_order_acquire); }
    void lock() {
        while (!try_lock()) std::this_thread::yield();
    }
    void unlock() { busy.store(false, std::memory_order_release); }
};

Shared shared;

Shared::Shared() {
    pthread_atfork(nullptr, nullptr, [] {
        // The threads did not survive the fork, so the old pool can neither run nor be joined: it is left
        // behind.
        shared.pool = nullptr;
        shared.unlock();
    });
}

}  // namespace

void set_num_threads(std::size_t num_threads, std::chrono::microseconds patience) {
    if (num_threads < 1 || num_threads > kMaxThreads)
        throw std::invalid_argument("num_threads: got " + std::to_string(num_threads) + ", expected 1 to " +
                                    std::to_string(kMaxThreads));
    shared.lock();
    if (num_threads != shared.num_threads.load(std::memory_order_relaxed) || patience != shared.patience) {
        delete shared.pool;
        shared.pool = nullptr;
        shared.num_threads.store(num_threads, std::memory_order_relaxed);
        shared.patience = patience;
        shared.cores.store(num_cores(), std::memory_order_relaxed);
    }
    shared.unlock();
}

std::size_t get_num_threads() { return shared.num_threads.load(std::memory_order_relaxed); }

std::size_t num_threads_beside_another() {
    const std::size_t cores = shared.cores.load(std::memory_order_relaxed);
    return std::max<std::size_t>(1, std::min(get_num_threads(), cores - 1));
}

void parallel_rows(std::size_t rows, std::size_t grain, std::size_t num_workers, RowFunction function,
                   const void* context) {
    if (rows == 0) return;
    const bool small = rows <= grain || rows - grain <= grain;
    if (small || num_workers <= 1 || get_num_threads() <= 1 || !shared.try_lock()) {
        function(context, 0, 0, rows);
        return;
    }
    try {
        if (shared.pool == nullptr) shared.pool = new Pool(get_num_threads(), shared.patience);
    } catch (...) {
        shared.unlock();
        throw;
    }
    shared.pool->run(rows, grain, num_workers, function, context);
    shared.unlock();
}

}  // namespace tsqp
