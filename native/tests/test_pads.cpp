// Pads: known answers of AES-256; each instruction set's kernels against the scalar ones and against what the
// definition says, with words of p put into the stream, on arrays that end before an unreadable page.

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "field/check_kernels.h"
#include "guarded.h"
#include "pads/hkdf.h"
#include "pads/pad_kernels.h"

using namespace tsqp;

namespace {

std::mt19937 random_bits(16);

std::vector<std::uint8_t> from_hex(const std::string& digits) {
    std::vector<std::uint8_t> bytes;
    for (std::size_t i = 0; i < digits.size(); i += 2)
        bytes.push_back(static_cast<std::uint8_t>(std::stoul(digits.substr(i, 2), nullptr, 16)));
    return bytes;
}

AesSchedule schedule_of(const std::vector<std::uint8_t>& key) {
    AesSchedule schedule;
    expand_key(key.data(), schedule);
    return schedule;
}

// The key whose bytes are 0, 1, 2, ...
AesSchedule counted_key() {
    std::vector<std::uint8_t> key(kAesKeyBytes);
    for (std::size_t i = 0; i < key.size(); ++i) key[i] = static_cast<std::uint8_t>(i);
    return schedule_of(key);
}

// FIPS 197, 5.1.1: the inverse modulo x^8 + x^4 + x^3 + x + 1, then an affine map.
void test_substituted() {
    const auto times = [](unsigned a, unsigned b) {
        unsigned product = 0;
        for (unsigned i = 0; i < 8; ++i) product ^= (b >> i & 1) ? a << i : 0;
        for (unsigned i = 15; i >= 8; --i) product ^= (product >> i & 1) ? 0x11Bu << (i - 8) : 0;
        return product;
    };
    for (unsigned byte = 0; byte < 256; ++byte) {
        unsigned inverse = 0, expected = 0x63;
        while (byte != 0 && times(byte, inverse) != 1) ++inverse;
        for (unsigned i = 0; i < 5; ++i) expected ^= (inverse << i | inverse >> (8 - i)) & 0xFF;
        CHECK(substituted(static_cast<std::uint8_t>(byte)) == expected);
    }
}

void test_known_answers() {
    // FIPS 197, A.3 and C.3.
    const AesSchedule expanded =
        schedule_of(from_hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"));
    CHECK(std::memcmp(expanded.rounds[14], from_hex("fe4890d1e6188d0b046df344706c631e").data(), 16) == 0);
    std::uint8_t blocks[kPlainBytes] = {};
    const auto put = [&blocks](std::size_t i, const std::string& digits) {
        std::memcpy(blocks + i * kAesBlockBytes, from_hex(digits).data(), kAesBlockBytes);
    };
    const auto is = [&blocks](std::size_t i, const std::string& digits) {
        return std::memcmp(blocks + i * kAesBlockBytes, from_hex(digits).data(), kAesBlockBytes) == 0;
    };
    for (std::size_t i = 0; i < kPlainBlocks; ++i) put(i, "00112233445566778899aabbccddeeff");
    PlainAes(counted_key()).encrypt(blocks);
    for (std::size_t i = 0; i < kPlainBlocks; ++i) CHECK(is(i, "8ea2b7ca516745bfeafc49904b496089"));
    // SP 800-38A, F.5.5: counter blocks and what they become.
    put(0, "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff");
    put(1, "f0f1f2f3f4f5f6f7f8f9fafbfcfdff00");
    put(2, "f0f1f2f3f4f5f6f7f8f9fafbfcfdff01");
    put(3, "f0f1f2f3f4f5f6f7f8f9fafbfcfdff02");
    PlainAes(expanded).encrypt(blocks);
    CHECK(is(0, "0bdf7df1591716335e9a8b15c860c502"));
    CHECK(is(1, "5a6e699d536119065433863c8f657b94"));
    CHECK(is(2, "1bc12c9c01610d5d0d8bd6a3378eca62"));
    CHECK(is(3, "2956e1c8693536b1bee99c73a31576b6"));
    // RFC 5869, A.1.
    HashWork work;
    std::uint8_t root[kDigestBytes], out[42];
    const std::vector<std::uint8_t> input(22, 0x0B), salt = from_hex("000102030405060708090a0b0c"),
                                                     info = from_hex("f0f1f2f3f4f5f6f7f8f9");
    const auto view = [](const std::vector<std::uint8_t>& bytes) {
        return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    hkdf_extract(work, view(salt), view(input), root);
    hkdf_expand(work, root, view(info), out, sizeof out);
    CHECK(
        std::memcmp(out,
                    from_hex("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b8871"
                             "85865")
                        .data(),
                    sizeof out) == 0);
}

// r of words as the definition has it, with the replacements' order written out.
std::vector<std::uint32_t> expected_pads(const std::vector<std::uint32_t>& words, std::size_t inputs) {
    std::vector<std::uint32_t> tail;
    for (std::size_t i = inputs; i < words.size(); ++i)
        if ((words[i] & kPrime) != kPrime) tail.push_back(words[i] & kPrime);
    std::vector<std::uint32_t> r;
    std::size_t used = 0;
    for (std::size_t i = 0; i < inputs; ++i)
        r.push_back((words[i] & kPrime) != kPrime ? words[i] & kPrime : tail.at(used++));
    return r;
}

constexpr std::uint64_t kRows[] = {0, 1, 1ull << 32, 0x0123456789ABCDEF, UINT64_MAX};

enum class Extremes { none, least, most };

// m and the integers that are left, of pads; with a copy and without.
template <class Mask>
void check_mask(const std::vector<std::uint32_t>& r, Extremes extremes, const Mask& mask) {
    const std::size_t inputs = r.size();
    Guarded<std::int32_t> integers(inputs);
    Guarded<std::uint32_t> m(inputs), copy(inputs);
    for (const bool has_copy : {false, true}) {
        std::vector<std::int32_t> before(inputs);
        constexpr auto kMost = static_cast<std::int32_t>(kPrime) - 1;
        for (std::int32_t& each : before)
            each = extremes == Extremes::least  ? -kMost
                   : extremes == Extremes::most ? kMost
                                                : static_cast<std::int32_t>(random_bits() % 65279) - 32639;
        std::copy(before.begin(), before.end(), integers.begin());
        std::fill(m.begin(), m.end(), 77u);
        mask({.inputs = inputs,
              .integers = integers.data(),
              .m = m.data(),
              .copy = has_copy ? copy.data() : nullptr});
        for (std::size_t i = 0; i < inputs; ++i) {
            CHECK(m[i] == residue(std::int64_t{before[i]} - r[i]));
            CHECK(integers[i] == centred(m[i]));
            CHECK(!has_copy || copy[i] == m[i]);
        }
    }
}

// Streams of chance and of one word, with words of p, with and without their top bit, where they are asked
// for.
void test_given(const PadKernels& kernels, std::size_t inputs, const std::vector<std::size_t>& primes,
                bool is_one_word, std::uint32_t word) {
    const std::size_t group = kStreamGroup / sizeof(std::uint32_t);
    std::vector<std::uint32_t> words((inputs + 3 * primes.size() + group) / group * group);
    for (std::uint32_t& each : words) each = is_one_word ? word : static_cast<std::uint32_t>(random_bits());
    for (std::uint32_t& each : words)
        if ((each & kPrime) == kPrime && !is_one_word) each = 5;
    for (std::size_t i = 0; i < primes.size(); ++i)
        if (primes[i] < words.size()) words[primes[i]] = i % 2 == 0 ? kPrime : UINT32_MAX;
    const std::vector<std::uint32_t> expected = expected_pads(words, inputs);
    const GivenRow row{reinterpret_cast<const std::uint8_t*>(words.data())};
    Guarded<std::uint32_t> r(inputs);
    kernels.draw_given(row, inputs, r.data());
    CHECK(std::equal(expected.begin(), expected.end(), r.begin()));
    if (inputs % 2 != 0) return;
    for (const Extremes extremes : {Extremes::none, Extremes::least, Extremes::most})
        check_mask(expected, extremes, [&](const MaskArgs& args) { kernels.mask_given(row, args); });
}

void test_replaced_words(const PadKernels& kernels) {
    for (const std::size_t inputs : {2, 3, 4, 8, 15, 16, 30, 32, 34, 64, 66, 127, 128, 144, 256, 378, 576}) {
        const std::size_t last = inputs - 1;
        test_given(kernels, inputs, {}, false, 0);
        test_given(kernels, inputs, {}, true, 0);
        test_given(kernels, inputs, {}, true, kPrime - 1);
        test_given(kernels, inputs, {0}, false, 0);
        test_given(kernels, inputs, {last}, false, 0);
        test_given(kernels, inputs, {0, last / 2, last}, false, 0);
        // Behind the row: skipped where a replacement is wanted, and else nobody's.
        test_given(kernels, inputs, {inputs}, false, 0);
        test_given(kernels, inputs, {last, inputs}, false, 0);
        test_given(kernels, inputs, {0, 1, last, inputs, inputs + 1, inputs + 3}, false, 0);
        for (int times = 0; times < 20; ++times) {
            std::vector<std::size_t> primes(1 + random_bits() % 20);
            for (std::size_t& each : primes) each = random_bits() % (inputs + 10);
            test_given(kernels, inputs, primes, false, 0);
        }
        std::vector<std::size_t> all(inputs);
        for (std::size_t i = 0; i < inputs; ++i) all[i] = i;
        test_given(kernels, inputs, all, false, 0);
    }
}

// Rows of keys: each set of kernels draws what the scalar ones do, and masks with what it draws.
void test_made(const PadKernels& kernels, const AesSchedule& schedule, std::uint64_t row,
               std::size_t inputs) {
    Guarded<std::uint32_t> r(inputs), expected(inputs);
    kernels.draw({&schedule, row}, inputs, r.data());
    kScalarPads.draw({&schedule, row}, inputs, expected.data());
    CHECK(std::equal(r.begin(), r.end(), expected.begin()));
    CHECK(std::all_of(r.begin(), r.end(), [](std::uint32_t word) { return word < kPrime; }));
    if (inputs % 2 == 0)
        check_mask({r.begin(), r.end()}, Extremes::none,
                   [&](const MaskArgs& args) { kernels.mask({&schedule, row}, args); });
}

// Rows of the counted key in which one word is p, as a search through 2^34 words has found them: what it is
// replaced by is the first word behind the row, which a longer row shows.
void test_words_of_p_in_streams(const PadKernels& kernels) {
    const AesSchedule schedule = counted_key();
    struct Found {
        std::uint64_t row;
        std::size_t k;
    };
    for (const auto& [row, k] : {Found{875'322, 274}, Found{2'121'503, 702}, Found{2'816'882, 2903}}) {
        for (const std::size_t inputs : {k, k + 1, k + 2, k + 15, (k / 128 + 1) * 128, k + 600}) {
            std::vector<std::uint32_t> r(inputs), longer(inputs + 1);
            kernels.draw({&schedule, row}, inputs, r.data());
            kernels.draw({&schedule, row}, inputs + 1, longer.data());
            for (std::size_t i = 0; i < inputs; ++i)
                CHECK(i == k ? r[i] == longer[inputs] : r[i] == longer[i]);
            test_made(kernels, schedule, row, inputs);
            test_made(kernels, schedule, row, inputs + inputs % 2);
        }
    }
}

}  // namespace

int main() {
    test_substituted();
    test_known_answers();
    const AesSchedule schedule = counted_key();
    for (const PadKernels* kernels : supported_pad_kernels()) {
        test_replaced_words(*kernels);
        for (const std::size_t inputs :
             {1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 64, 66, 127, 128, 129, 254, 577, 1536})
            for (const std::uint64_t row : kRows) test_made(*kernels, schedule, row, inputs);
        // Numbers of blocks that take more than a byte and more than two.
        test_made(*kernels, schedule, 5, 66'310);
        test_made(*kernels, schedule, 5, 4 * 65'536 + 258);
        test_words_of_p_in_streams(*kernels);
    }
    std::puts("pads: ok");
}
