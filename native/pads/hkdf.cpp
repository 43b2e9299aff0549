#include "pads/hkdf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tsqp {
namespace {

// FIPS 180-4, 4.2.2: of the first 64 primes' cube roots.
constexpr std::uint32_t kRoundConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr std::uint32_t kInitialState[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

void store_big_endian(std::uint32_t word, std::uint8_t* to) {
    for (std::size_t i = 0; i < 4; ++i) to[i] = static_cast<std::uint8_t>(word >> (24 - 8 * i));
}

void compress(HashWork& work) {
    std::uint32_t* const w = work.schedule;
    for (std::size_t i = 0; i < 16; ++i) {
        const std::uint8_t* const from = work.block + 4 * i;
        w[i] = std::uint32_t{from[0]} << 24 | std::uint32_t{from[1]} << 16 | std::uint32_t{from[2]} << 8 |
               from[3];
    }
    for (std::size_t i = 16; i < 64; ++i) {
        const std::uint32_t before = w[i - 15], last = w[i - 2];
        w[i] = w[i - 16] + (std::rotr(before, 7) ^ std::rotr(before, 18) ^ before >> 3) + w[i - 7] +
               (std::rotr(last, 17) ^ std::rotr(last, 19) ^ last >> 10);
    }
    std::uint32_t a = work.state[0], b = work.state[1], c = work.state[2], d = work.state[3],
                  e = work.state[4], f = work.state[5], g = work.state[6], h = work.state[7];
    for (std::size_t i = 0; i < 64; ++i) {
        const std::uint32_t first = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                                    ((e & f) ^ (~e & g)) + kRoundConstants[i] + w[i];
        const std::uint32_t second =
            (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const std::uint32_t sums[8] = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) work.state[i] += sums[i];
}

void begin(HashWork& work) {
    std::copy_n(kInitialState, 8, work.state);
    work.size_bytes = 0;
}

void add(HashWork& work, const void* bytes, std::size_t size) {
    const auto* from = static_cast<const std::uint8_t*>(bytes);
    while (size > 0) {
        const std::size_t at = work.size_bytes % sizeof work.block,
                          count = std::min(size, sizeof work.block - at);
        std::memcpy(work.block + at, from, count);
        work.size_bytes += count, from += count, size -= count;
        if (at + count == sizeof work.block) compress(work);
    }
}

void end(HashWork& work, std::uint8_t* digest) {
    const std::uint64_t size_bits = 8 * work.size_bytes;
    constexpr std::uint8_t kOne = 0x80, kZero = 0;
    add(work, &kOne, 1);
    while (work.size_bytes % sizeof work.block != sizeof work.block - sizeof size_bits) add(work, &kZero, 1);
    std::uint8_t size[8];
    store_big_endian(static_cast<std::uint32_t>(size_bits >> 32), size);
    store_big_endian(static_cast<std::uint32_t>(size_bits), size + 4);
    add(work, size, sizeof size);
    for (std::size_t i = 0; i < 8; ++i) store_big_endian(work.state[i], digest + 4 * i);
}

void begin_keyed(HashWork& work, std::uint8_t pad) {
    for (std::uint8_t& byte : work.padded_key) byte ^= pad;
    begin(work);
    add(work, work.padded_key, sizeof work.padded_key);
    for (std::uint8_t& byte : work.padded_key) byte ^= pad;
}

void begin_hmac(HashWork& work, std::string_view key) {
    std::memset(work.padded_key, 0, sizeof work.padded_key);
    if (key.size() > sizeof work.padded_key) {
        begin(work);
        add(work, key.data(), key.size());
        end(work, work.padded_key);
    } else {
        std::copy(key.begin(), key.end(), work.padded_key);
    }
    begin_keyed(work, 0x36);
}

// mac may be work.digest.
void end_hmac(HashWork& work, std::uint8_t* mac) {
    end(work, work.digest);
    begin_keyed(work, 0x5C);
    add(work, work.digest, sizeof work.digest);
    end(work, mac);
}

}  // namespace

void hkdf_extract(HashWork& work, std::string_view salt, std::string_view input, std::uint8_t* prk) {
    begin_hmac(work, salt);
    add(work, input.data(), input.size());
    end_hmac(work, prk);
}

void hkdf_expand(HashWork& work, const std::uint8_t* prk, std::string_view info, std::uint8_t* out,
                 std::size_t size) {
    if (size > kMaxExpandedBytes)
        throw std::invalid_argument("size: got " + std::to_string(size) + ", expected at most " +
                                    std::to_string(kMaxExpandedBytes));
    const std::string_view key(reinterpret_cast<const char*>(prk), kDigestBytes);
    std::uint8_t number = 0;
    for (std::size_t done = 0; done < size; done += kDigestBytes) {
        begin_hmac(work, key);
        if (number > 0) add(work, work.digest, sizeof work.digest);
        ++number;
        add(work, info.data(), info.size());
        add(work, &number, 1);
        end_hmac(work, work.digest);
        std::memcpy(out + done, work.digest, std::min(kDigestBytes, size - done));
    }
}

}  // namespace tsqp
