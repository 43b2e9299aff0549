// A native thread that raises a word in the arena while its process lives, whatever the interpreter is doing.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "border/signal_mask.h"

namespace tsqp {

class Heartbeat {
  public:
    // SAFETY: word is aligned and outlives this object; the binding holds the mapping.
    Heartbeat(std::uint64_t* word, std::chrono::milliseconds interval)
        : thread_([this, word, interval] { run(word, interval); }) {}

    ~Heartbeat() { stop(); }
    Heartbeat(const Heartbeat&) = delete;
    Heartbeat& operator=(const Heartbeat&) = delete;

    void stop() {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        if (thread_.joinable()) thread_.join();
    }

  private:
    void run(std::uint64_t* word, std::chrono::milliseconds interval) {
        // Signals are for the interpreter's threads: one that lands here would not end their sleep.
        const sigset_t blocked = all_signals_but_faults();
        pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
        std::unique_lock lock(mutex_);
        for (std::uint64_t beat = 1; !stopping_; ++beat) {
            std::atomic_ref(*word).store(beat, std::memory_order_relaxed);
            wake_.wait_for(lock, interval, [this] { return stopping_; });
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    bool stopping_ = false;
    std::thread thread_;  // last: it uses the members above
};

}  // namespace tsqp
