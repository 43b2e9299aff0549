// Keys of pads: by their definition, on every instruction set, in a forked child, by several threads, and
// what is left on the stack of those who made and used them.

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "field/check_kernels.h"
#include "kernels/dispatch.h"
#include "pads/hkdf.h"
#include "pads/keys.h"
#include "pads/pad_kernels.h"

using namespace tsqp;

namespace {

constexpr std::size_t kSeedBytes = 32;
constexpr std::uint64_t kRow = 1ull << 40;

// With what checks memory frames are larger, and some of them elsewhere.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kHasPlainStack = false;
#else
constexpr bool kHasPlainStack = true;
#endif

// By the definition, of context and index as bytes.
struct Derived {
    Derived(const std::uint8_t* seed, std::string_view info) {
        HashWork work;
        std::uint8_t key[kAesKeyBytes];
        const std::string_view input(reinterpret_cast<const char*>(seed), kSeedBytes);
        hkdf_extract(work, "tsqp-shm pads 1", input, root);
        hkdf_expand(work, root, info, key, sizeof key);
        expand_key(key, schedule);
    }
    std::uint8_t root[kDigestBytes];
    AesSchedule schedule;
};

void test_keys() {
    std::uint8_t seed[kSeedBytes];
    for (std::size_t i = 0; i < sizeof seed; ++i) seed[i] = static_cast<std::uint8_t>(i);
    const PadKeys keys("session", "digest", 3, 5, seed), same("session", "digest", 3, 5, seed);
    const char info[] = "pad key\0\7session\0\6digest\0\0\0\0\0\0\0\3\0\0\0\4";
    const Derived derived(seed, std::string_view(info, sizeof info - 1));
    std::vector<std::uint32_t> r(100), expected(100);
    kScalarPads.draw({&derived.schedule, kRow}, expected.size(), expected.data());
    const auto draw = [&r](const PadKeys& of, std::size_t linear, std::uint64_t row) {
        of.draw(linear, row, r.size(), r.data());
        return r;
    };
    CHECK(draw(keys, 4, kRow) == expected && draw(same, 4, kRow) == expected);
    CHECK(keys.key_id() == same.key_id() && keys.key_id().size() == 32);
    std::vector<std::int32_t> integers(expected.size(), -5);
    std::vector<std::uint32_t> m(expected.size()), copy(expected.size());
    keys.mask(4, kRow, expected.size(), integers.data(), m.data(), copy.data());
    for (std::size_t i = 0; i < m.size(); ++i)
        CHECK(m[i] == residue(-5 - std::int64_t{expected[i]}) && copy[i] == m[i] &&
              integers[i] == centred(m[i]));
    // Whatever else is said is another key.
    std::vector<std::vector<std::uint32_t>> drawn{expected, draw(keys, 3, kRow), draw(keys, 4, 1)};
    std::vector<std::string> ids{keys.key_id()};
    const auto add = [&](const PadKeys& of) {
        drawn.push_back(draw(of, 4, kRow));
        ids.push_back(of.key_id());
    };
    add(PadKeys("session", "digest", 4, 5, seed));
    add(PadKeys("session", "diges", 3, 5, seed));
    add(PadKeys("sessio", "ndigest", 3, 5, seed));
    add(PadKeys("session", "digest", 3, 5, nullptr));
    add(PadKeys("session", "digest", 3, 5, nullptr));
    std::sort(drawn.begin(), drawn.end());
    std::sort(ids.begin(), ids.end());
    CHECK(std::adjacent_find(drawn.begin(), drawn.end()) == drawn.end());
    CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
}

template <class Error, class Call>
bool raises(const Call& call) {
    try {
        call();
    } catch (const Error&) {
        return true;
    }
    return false;
}

void test_refusals() {
    const std::string longest(65'535, 'x');
    CHECK(raises<std::invalid_argument>([] { PadKeys("s", "d", 0, 0, nullptr); }));
    CHECK(raises<std::invalid_argument>([&] { PadKeys(longest + "x", "d", 0, 1, nullptr); }));
    const PadKeys keys(longest, longest, 0, 2, nullptr);
    std::uint32_t r[2];
    CHECK(raises<std::out_of_range>([&] { keys.draw(2, 0, 2, r); }));
}

// A forked child has neither keys nor pads; its parent has them as before.
void test_a_forked_child_has_no_keys() {
    const PadKeys keys("session", "digest", 0, 2, nullptr);
    std::vector<std::uint32_t> before(10), after(10);
    keys.draw(1, 7, before.size(), before.data());
    const pid_t child = fork();
    if (child == 0) {
        std::int32_t integers[2] = {1, 2};
        std::uint32_t m[2] = {5, 5};
        const bool refused = raises<std::logic_error>([&] { keys.draw(1, 7, after.size(), after.data()); }) &&
                             raises<std::logic_error>([&] { keys.mask(1, 7, 2, integers, m, nullptr); });
        const bool untouched = integers[0] == 1 && m[0] == 5 && after[0] == 0;
        _exit(refused && untouched ? 0 : 1);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    keys.draw(1, 7, after.size(), after.data());
    CHECK(before == after);
}

void test_threads_draw_at_once() {
    const PadKeys keys("session", "digest", 0, 3, nullptr);
    std::vector<std::vector<std::uint32_t>> drawn(4, std::vector<std::uint32_t>(576 * 8));
    const auto draw = [&keys](std::vector<std::uint32_t>& to) {
        for (std::size_t row = 0; row < 8; ++row) keys.draw(2, row, 576, to.data() + row * 576);
    };
    std::vector<std::thread> threads;
    for (auto& each : drawn) threads.emplace_back([&] { draw(each); });
    for (std::thread& thread : threads) thread.join();
    for (const auto& each : drawn) CHECK(each == drawn[0]);
}

// A thread on a stack of its own, which is looked through after its end.
template <class Work>
std::vector<std::uint8_t> stack_after(const Work& work) {
    constexpr std::size_t kSize = 1 << 20;
    void* const stack = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(stack != MAP_FAILED);
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstack(&attributes, stack, kSize) == 0);
    const auto run = [](void* function) -> void* {
        (*static_cast<const Work*>(function))();
        return nullptr;
    };
    CHECK(pthread_create(&thread, &attributes, run, const_cast<Work*>(&work)) == 0 &&
          pthread_join(thread, nullptr) == 0 && pthread_attr_destroy(&attributes) == 0);
    const auto* const bytes = static_cast<const std::uint8_t*>(stack);
    std::vector<std::uint8_t> left(bytes, bytes + kSize);
    munmap(stack, kSize);
    return left;
}

bool holds(const std::vector<std::uint8_t>& bytes, const void* secret, std::size_t size) {
    return memmem(bytes.data(), bytes.size(), secret, size) != nullptr;
}

// Neither keys of rounds nor two neighbouring pads, with or without their words' top bits.
void test_nothing_stays_on_the_stack(const PadKernels& kernels) {
    std::uint8_t key[kAesKeyBytes];
    for (std::size_t i = 0; i < sizeof key; ++i) key[i] = static_cast<std::uint8_t>(i);
    AesSchedule schedule;
    expand_key(key, schedule);
    // Of this key's row a word is replaced.
    constexpr std::uint64_t kReplaced = 875'322;
    constexpr std::size_t kInputs = 630;
    std::vector<std::uint32_t> r(kInputs), m(kInputs);
    std::vector<std::int32_t> integers(kInputs);
    const auto look_through = [&](const std::vector<std::uint8_t>& stack) {
        for (const auto& part : schedule.rounds) CHECK(!holds(stack, part, sizeof part));
        std::set<std::pair<std::uint32_t, std::uint32_t>> pairs;
        for (std::size_t i = 0; i + 1 < kInputs; ++i) pairs.emplace(r[i], r[i + 1]);
        for (std::size_t at = 0; at + 8 <= stack.size(); at += 4) {
            std::uint32_t two[2];
            std::memcpy(two, stack.data() + at, sizeof two);
            CHECK(!pairs.contains({two[0] & kPrime, two[1] & kPrime}));
        }
    };
    look_through(stack_after([&] { kernels.draw({&schedule, kReplaced}, kInputs, r.data()); }));
    look_through(stack_after([&] {
        kernels.mask({&schedule, kReplaced},
                     {.inputs = kInputs, .integers = integers.data(), .m = m.data(), .copy = nullptr});
    }));
}

void test_no_key_stays_on_the_stack() {
    const std::uint8_t seed[kSeedBytes] = {7};
    const char info[] = "pad key\0\1s\0\1d\0\0\0\0\0\0\0\0\0\0\0\1";
    const Derived derived(seed, std::string_view(info, sizeof info - 1));
    std::vector<std::uint32_t> r(2), expected(2);
    const std::vector<std::uint8_t> stack = stack_after([&] {
        const PadKeys keys("s", "d", 0, 2, seed);
        keys.draw(1, 5, r.size(), r.data());
    });
    kScalarPads.draw({&derived.schedule, 5}, expected.size(), expected.data());
    CHECK(r == expected);
    for (const auto& part : derived.schedule.rounds) CHECK(!holds(stack, part, sizeof part));
    CHECK(!holds(stack, derived.root, 16) && !holds(stack, derived.root + 16, 16));
}

}  // namespace

int main() {
    for (const KernelTable* table : supported_kernels()) {
        use_kernels(table->name);
        test_keys();
        test_a_forked_child_has_no_keys();
    }
    if (kHasPlainStack) {
        for (const PadKernels* kernels : supported_pad_kernels()) test_nothing_stays_on_the_stack(*kernels);
        test_no_key_stays_on_the_stack();
    }
    test_refusals();
    test_threads_draw_at_once();
    std::puts("pad keys: ok");
}
