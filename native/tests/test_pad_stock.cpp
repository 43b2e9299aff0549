// Stocks of pads under the thread sanitizer: rows that makers write and a taking thread reads and wipes, round
// after round; ends in the middle; a maker that fails; and the maker that multiplies, against 64-bit integers.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/thread_pool.h"
#include "kernels/dispatch.h"
#include "pads/direct_maker.h"
#include "pads/rows.h"
#include "pads/stock.h"

using namespace tsqp;
using namespace std::chrono_literals;

namespace {

constexpr auto kSoon = 30s;

std::shared_ptr<const PadKeys> keys_of(std::size_t num_linears) {
    const std::uint8_t seed[32] = {1, 2, 3};
    return std::make_shared<PadKeys>("session", "digest", 0, num_linears, seed);
}

// What the word of a row must be: no row of any Linear has that of another.
std::uint32_t word_of(std::size_t linear, std::uint64_t row, std::size_t output) {
    return static_cast<std::uint32_t>((row * 31 + linear * 7 + output * 3) % kPrime);
}

// Writes rows that tell which they are, and fails where it is told to.
class TellingMaker : public PadMaker {
  public:
    TellingMaker(std::vector<std::size_t> outputs, std::uint64_t fails_at = UINT64_MAX)
        : outputs_(std::move(outputs)), fails_at_(fails_at), is_at_work_(outputs_.size()) {}

    std::size_t batch_rows() const override { return 7; }
    void make(std::size_t linear, std::uint64_t first, std::size_t rows, std::uint32_t* products,
              const Rest& rest) override {
        rest.look();
        CHECK(rows >= 1 && rows <= batch_rows());
        CHECK(!is_at_work_[linear].exchange(true));
        if (first + rows > fails_at_) throw std::runtime_error("the maker is told to fail");
        for (std::uint64_t row = first; row < first + rows; ++row)
            for (std::size_t output = 0; output < outputs_[linear]; ++output)
                *products++ = word_of(linear, row, output);
        is_at_work_[linear] = false;
    }

  private:
    const std::vector<std::size_t> outputs_;
    const std::uint64_t fails_at_;
    std::vector<std::atomic<bool>> is_at_work_;  // of a Linear is one thread at a time
};

std::vector<StockedLinear> stocked(const std::vector<std::size_t>& outputs) {
    std::vector<StockedLinear> linears;
    for (const std::size_t each : outputs) linears.push_back({.outputs = each, .fingerprint = each});
    return linears;
}

std::shared_ptr<PadStock> stock_of(const std::vector<std::size_t>& outputs, std::size_t capacity,
                                   std::size_t threads, std::uint64_t fails_at = UINT64_MAX) {
    return std::make_shared<PadStock>(keys_of(outputs.size()),
                                      std::make_unique<TellingMaker>(outputs, fails_at), stocked(outputs),
                                      capacity, threads, false);
}

void check_rows(const PadRows& rows, std::size_t outputs) {
    for (std::size_t row = 0; row < rows.rows(); ++row)
        for (std::size_t output = 0; output < outputs; ++output)
            CHECK(rows.product(row)[output] == word_of(rows.linear(), rows.first_row() + row, output));
}

void test_rows_come_once_and_in_order(std::size_t capacity, std::size_t threads) {
    const std::vector<std::size_t> outputs{1, 5, 64, 17};
    const auto stock = stock_of(outputs, capacity, threads);
    std::mt19937 random(static_cast<unsigned>(capacity * 10 + threads));
    std::vector<std::uint64_t> next(outputs.size());
    std::deque<std::shared_ptr<PadRows>> held;
    while (*std::min_element(next.begin(), next.end()) < 12 * capacity) {
        const std::size_t linear = random() % outputs.size(),
                          rows = 1 + random() % std::min<std::size_t>(capacity, 9);
        std::shared_ptr<PadRows> taken = stock->take(linear, rows);
        if (!taken) {
            held.clear();
            CHECK(stock->wait(linear, rows, kSoon));
            CHECK(stock->available_of(linear) >= rows);
            taken = stock->take(linear, rows);
        }
        CHECK(taken && taken->first_row() == next[linear] && taken->rows() == rows);
        next[linear] += rows;
        check_rows(*taken, outputs[linear]);
        held.insert(held.begin() + static_cast<std::ptrdiff_t>(random() % (held.size() + 1)),
                    std::move(taken));
        if (held.size() > 3) held.pop_back();
    }
    for (const auto& taken : held) check_rows(*taken, outputs[taken->linear()]);
    held.clear();
    const PadCounts counts = stock->counts();
    CHECK(counts.used == 0 && counts.burned == next[0] + next[1] + next[2] + next[3]);
    CHECK(counts.made >= counts.burned && counts.made <= counts.burned + outputs.size() * capacity);
}

void test_a_stock_that_is_full_sleeps_and_wakes(std::size_t threads) {
    const auto stock = stock_of({3, 2}, 20, threads);
    for (int round = 0; round < 200; ++round) {
        for (const std::size_t linear : {0, 1}) CHECK(stock->wait(linear, 20, kSoon));
        CHECK(stock->available() == 20 && stock->counts().made == 40u * (static_cast<unsigned>(round) + 1));
        for (const std::size_t linear : {0, 1}) CHECK(stock->take(linear, 20));
    }
}

void test_it_ends_in_the_middle(std::size_t threads) {
    for (int round = 0; round < 100; ++round) {
        const auto stock = stock_of({300, 200}, 50, threads);
        std::shared_ptr<PadRows> taken;
        if (round % 2 == 0 && stock->wait(1, 3, kSoon)) taken = stock->take(1, 3);
        std::thread waiting([&] { CHECK(!stock->wait(0, 51, kSoon)); });
        stock->close();
        waiting.join();
        CHECK(!stock->take(0, 1) && stock->available() == 0 && !stock->wait(0, 1, kSoon) && !stock->fault());
        if (taken) check_rows(*taken, 200);
    }
}

void test_makers_rest_and_go_on(std::size_t threads) {
    const auto stock = stock_of({3, 2}, 20, threads);
    for (int round = 0; round < 500; ++round) {
        stock->rest(round % 3 != 0);
        const std::size_t linear = static_cast<std::size_t>(round) % 2,
                          rows = 1 + static_cast<std::size_t>(round) % 20;
        CHECK(stock->wait(linear, rows, kSoon));
        check_rows(*stock->take(linear, rows), linear == 0 ? 3 : 2);
    }
    stock->rest(true);  // it ends all the same
}

void test_a_maker_that_fails_ends_the_stock(std::size_t threads) {
    const auto stock = stock_of({3, 2}, 20, threads, 30);
    std::shared_ptr<PadRows> held;
    while (stock->wait(0, 1, kSoon))
        if (auto taken = stock->take(0, 1)) held = std::move(taken);
    CHECK(stock->fault() == "the maker is told to fail");
    CHECK(!stock->take(1, 1) && !stock->wait(1, 1, kSoon) && stock->available() == 0);
    if (held) check_rows(*held, 3);
}

void test_rows_that_are_given_back_are_wiped() {
    const auto stock = stock_of({5}, 14, 1);
    CHECK(stock->wait(0, 14, kSoon));
    auto first = stock->take(0, 1), second = stock->take(0, 13);
    const std::uint32_t* const words = second->product(0);
    second.reset();  // its slots are not free before the first one's
    for (std::size_t i = 0; i < 13 * 5; ++i) CHECK(words[i] == 0);
    check_rows(*first, 5);
}

void test_the_maker_that_multiplies(std::size_t outputs, std::size_t inputs, std::size_t rows) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> weight(outputs * inputs);
    for (float& each : weight) each = normal(random);
    FieldWeights weights(outputs, inputs);
    weights.set_rows(kScalarField, 0, outputs, weight.data());
    std::vector<std::int8_t> bytes(outputs * inputs);
    weights.unpack(0, outputs, bytes.data());
    const auto keys = keys_of(2);
    DirectMaker maker(keys, {&weights, &weights});
    for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{1} << 40}) {
        std::vector<std::uint32_t> products(rows * outputs, 7), pad(inputs);
        maker.make(1, first, rows, products.data(), Rest());
        for (std::size_t row = 0; row < rows; ++row) {
            keys->draw(1, first + row, inputs, pad.data());
            for (std::size_t j = 0; j < outputs; ++j) {
                std::int64_t sum = 0;
                for (std::size_t k = 0; k < inputs; ++k) sum += std::int64_t{pad[k]} * bytes[j * inputs + k];
                CHECK(products[row * outputs + j] ==
                      static_cast<std::uint32_t>((sum % kPrime + kPrime) % kPrime));
            }
        }
    }
}

}  // namespace

int main() {
    for (const std::size_t threads : {1, 2, 4}) {
        for (const std::size_t capacity : {1, 2, 7, 8, 30})
            test_rows_come_once_and_in_order(capacity, threads);
        test_a_stock_that_is_full_sleeps_and_wakes(threads);
        test_it_ends_in_the_middle(threads);
        test_makers_rest_and_go_on(threads);
        test_a_maker_that_fails_ends_the_stock(threads);
    }
    test_rows_that_are_given_back_are_wiped();
    for (const KernelTable* table : supported_kernels()) {
        use_kernels(table->name);
        for (const std::size_t rows : {1, 47, 96})
            for (const std::size_t outputs : {1, 65, 130}) test_the_maker_that_multiplies(outputs, 70, rows);
    }
    std::puts("pad stock: ok");
}
