#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/thread_pool.h"

using namespace tsqp;

namespace {

// Each row is visited once, by a worker whose number is in range.
void run_job(std::size_t rows, std::size_t grain, std::size_t num_workers) {
    std::vector<int> visits(rows, 0);  // plain: a row visited twice at once is a race that TSan sees
    std::atomic<bool> in_range{true};
    parallel_rows(rows, grain, num_workers, [&](std::size_t worker, std::size_t begin, std::size_t end) {
        if (worker >= num_workers) in_range = false;
        for (std::size_t row = begin; row < end; ++row) ++visits[row];
    });
    CHECK(in_range);
    for (const int count : visits) CHECK(count == 1);
}

void test_every_row_is_visited_once() {
    for (const std::size_t num_threads : {1u, 2u, 3u, 8u}) {
        set_num_threads(num_threads);
        CHECK(get_num_threads() == num_threads);
        for (const std::size_t rows : {0u, 1u, 2u, 3u, 7u, 64u, 1000u})
            for (const std::size_t grain : {1u, 2u, 5u, 100u}) run_job(rows, grain, num_threads);
        run_job(100, 1, 2);
        run_job(100, 1, 300);
    }
}

void test_a_core_is_left_to_another_process() {
    cpu_set_t allowed;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    const auto cores = static_cast<std::size_t>(CPU_COUNT(&allowed));
    for (const std::size_t num_threads : {std::size_t{1}, cores, cores + 3}) {
        set_num_threads(num_threads);
        CHECK(num_threads_beside_another() >= 1);
        CHECK(num_threads_beside_another() == 1 || num_threads_beside_another() < cores);
        CHECK(num_threads_beside_another() <= num_threads);
    }
    set_num_threads(1);
    CHECK(num_threads_beside_another() == 1);
}

void test_late_workers_find_the_next_job_not_the_last() {
    set_num_threads(4);
    for (std::size_t i = 0; i < 20000; ++i) run_job(3 + i % 5, 1, 4);
}

void test_jobs_of_two_threads_do_not_mix() {
    set_num_threads(3);
    std::thread other([] {
        for (int i = 0; i < 2000; ++i) run_job(50, 3, 3);
    });
    for (int i = 0; i < 2000; ++i) run_job(70, 2, 3);
    for (std::size_t i = 0; i < 50; ++i) set_num_threads(1 + i % 4);
    other.join();
}

[[maybe_unused]] void test_a_forked_child_makes_its_own_threads() {
    set_num_threads(3);
    run_job(100, 1, 3);
    for (int i = 0; i < 10; ++i) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(20);
            run_job(100, 1, 3);
            set_num_threads(2);
            run_job(100, 1, 2);
            _exit(0);
        }
        run_job(100, 1, 3);
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
}

[[maybe_unused]] void test_a_fork_during_a_job_leaves_the_child_usable() {
    set_num_threads(3);
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) run_job(200, 1, 3);
    });
    for (int i = 0; i < 20; ++i) {
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            alarm(20);
            std::atomic<std::size_t> rows{
                0};  // no allocation: the other thread may have held the allocator's lock
            parallel_rows(9, 1, 1,
                          [&](std::size_t, std::size_t begin, std::size_t end) { rows += end - begin; });
            _exit(rows == 9 ? 0 : 1);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    stop = true;
    busy.join();
}

void test_thread_counts_out_of_range_are_refused() {
    for (const std::size_t count : {std::size_t{0}, kMaxThreads + 1}) {
        bool refused = false;
        try {
            set_num_threads(count);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        CHECK(refused);
    }
}

}  // namespace

int main() {
    CHECK(get_num_threads() == 1);
    test_every_row_is_visited_once();
    test_a_core_is_left_to_another_process();
    test_late_workers_find_the_next_job_not_the_last();
    test_jobs_of_two_threads_do_not_mix();
#if !defined(__SANITIZE_THREAD__)  // TSan cannot follow threads that a forked child starts
    test_a_forked_child_makes_its_own_threads();
    test_a_fork_during_a_job_leaves_the_child_usable();
#endif
    test_thread_counts_out_of_range_are_refused();
}  // the pool is still alive: exit must join its threads
