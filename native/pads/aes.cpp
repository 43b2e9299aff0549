#include "pads/aes.h"

#include <bit>
#include <cstring>

namespace tsqp {
namespace {

static_assert(std::endian::native == std::endian::little);

// Bit i of every byte lies in plane i: byte b of block n at bit 4 b + n. FIPS 197 fills its state column by
// column, so a row is every fourth byte and a column sixteen bits side by side.
struct Planes {
    std::uint64_t bits[8];
};

// An 8 x 8 matrix of bits, its rows the bytes of a word, mirrored along its diagonal.
std::uint64_t transposed(std::uint64_t x) {
    const auto swap = [&x](unsigned distance, std::uint64_t mask) {
        const std::uint64_t changed = (x ^ (x >> distance)) & mask;
        x ^= changed ^ (changed << distance);
    };
    swap(7, 0x00AA00AA00AA00AA);
    swap(14, 0x0000CCCC0000CCCC);
    swap(28, 0x00000000F0F0F0F0);
    return x;
}

Planes planes_of(const std::uint8_t* blocks) {
    std::uint8_t bytes[8][8];  // of each plane
    for (std::size_t pair = 0; pair < 8; ++pair) {
        std::uint64_t eight = 0;
        for (std::size_t i = 0; i < 8; ++i)
            eight |= std::uint64_t{blocks[i % 4 * kAesBlockBytes + 2 * pair + i / 4]} << (8 * i);
        eight = transposed(eight);
        for (std::size_t plane = 0; plane < 8; ++plane)
            bytes[plane][pair] = static_cast<std::uint8_t>(eight >> (8 * plane));
    }
    Planes planes;
    std::memcpy(planes.bits, bytes, sizeof planes.bits);
    return planes;
}

void blocks_of(const Planes& planes, std::uint8_t* blocks) {
    std::uint8_t bytes[8][8];
    std::memcpy(bytes, planes.bits, sizeof planes.bits);
    for (std::size_t pair = 0; pair < 8; ++pair) {
        std::uint64_t eight = 0;
        for (std::size_t plane = 0; plane < 8; ++plane)
            eight |= std::uint64_t{bytes[plane][pair]} << (8 * plane);
        eight = transposed(eight);
        for (std::size_t i = 0; i < 8; ++i)
            blocks[i % 4 * kAesBlockBytes + 2 * pair + i / 4] = static_cast<std::uint8_t>(eight >> (8 * i));
    }
}

// The table of FIPS 197, 5.1.1: the inverse in the field of 256 elements, then an affine map.
//
// Source: J. Boyar and R. Peralta, "A new combinational logic minimization technique with applications to
// cryptology", SEA 2010, figures 6 to 8: 113 gates, with their names.
void substitute(Planes& planes) {
    using Plane = std::uint64_t;
    Plane* const q = planes.bits;
    const Plane x0 = q[7], x1 = q[6], x2 = q[5], x3 = q[4], x4 = q[3], x5 = q[2], x6 = q[1], x7 = q[0];

    const Plane y14 = x3 ^ x5, y13 = x0 ^ x6, y9 = x0 ^ x3, y8 = x0 ^ x5, t0 = x1 ^ x2, y1 = t0 ^ x7,
                y4 = y1 ^ x3, y12 = y13 ^ y14, y2 = y1 ^ x0, y5 = y1 ^ x6, y3 = y5 ^ y8, t1 = x4 ^ y12,
                y15 = t1 ^ x5, y20 = t1 ^ x1, y6 = y15 ^ x7, y10 = y15 ^ t0, y11 = y20 ^ y9, y7 = x7 ^ y11,
                y17 = y10 ^ y11, y19 = y10 ^ y8, y16 = t0 ^ y11, y21 = y13 ^ y16, y18 = x0 ^ y16;

    const Plane t2 = y12 & y15, t3 = y3 & y6, t4 = t3 ^ t2, t5 = y4 & x7, t6 = t5 ^ t2, t7 = y13 & y16,
                t8 = y5 & y1, t9 = t8 ^ t7, t10 = y2 & y7, t11 = t10 ^ t7, t12 = y9 & y11, t13 = y14 & y17,
                t14 = t13 ^ t12, t15 = y8 & y10, t16 = t15 ^ t12, t17 = t4 ^ t14, t18 = t6 ^ t16,
                t19 = t9 ^ t14, t20 = t11 ^ t16, t21 = t17 ^ y20, t22 = t18 ^ y19, t23 = t19 ^ y21,
                t24 = t20 ^ y18;

    const Plane t25 = t21 ^ t22, t26 = t21 & t23, t27 = t24 ^ t26, t28 = t25 & t27, t29 = t28 ^ t22,
                t30 = t23 ^ t24, t31 = t22 ^ t26, t32 = t31 & t30, t33 = t32 ^ t24, t34 = t23 ^ t33,
                t35 = t27 ^ t33, t36 = t24 & t35, t37 = t36 ^ t34, t38 = t27 ^ t36, t39 = t29 & t38,
                t40 = t25 ^ t39, t41 = t40 ^ t37, t42 = t29 ^ t33, t43 = t29 ^ t40, t44 = t33 ^ t37,
                t45 = t42 ^ t41;

    const Plane z0 = t44 & y15, z1 = t37 & y6, z2 = t33 & x7, z3 = t43 & y16, z4 = t40 & y1, z5 = t29 & y7,
                z6 = t42 & y11, z7 = t45 & y17, z8 = t41 & y10, z9 = t44 & y12, z10 = t37 & y3,
                z11 = t33 & y4, z12 = t43 & y13, z13 = t40 & y5, z14 = t29 & y2, z15 = t42 & y9,
                z16 = t45 & y14, z17 = t41 & y8;

    const Plane t46 = z15 ^ z16, t47 = z10 ^ z11, t48 = z5 ^ z13, t49 = z9 ^ z10, t50 = z2 ^ z12,
                t51 = z2 ^ z5, t52 = z7 ^ z8, t53 = z0 ^ z3, t54 = z6 ^ z7, t55 = z16 ^ z17, t56 = z12 ^ t48,
                t57 = t50 ^ t53, t58 = z4 ^ t46, t59 = z3 ^ t54, t60 = t46 ^ t57, t61 = z14 ^ t57,
                t62 = t52 ^ t58, t63 = t49 ^ t58, t64 = z4 ^ t59, t65 = t61 ^ t62, t66 = z1 ^ t63,
                t67 = t64 ^ t65;

    q[7] = t59 ^ t63;
    q[4] = t53 ^ t66;
    q[6] = t64 ^ ~q[4];
    q[5] = t55 ^ ~t67;
    q[3] = t51 ^ t66;
    q[2] = t47 ^ t65;
    q[1] = t56 ^ ~t62;
    q[0] = t48 ^ ~t60;
}

// Row r of the state moves r columns to the left.
void shift_rows(Planes& planes) {
    constexpr std::uint64_t kRow = 0x000F000F000F000F;
    for (std::uint64_t& x : planes.bits)
        x = (x & kRow) | (std::rotr(x, 16) & kRow << 4) | (std::rotr(x, 32) & kRow << 8) |
            (std::rotr(x, 48) & kRow << 12);
}

// b[r] = 2 a[r] + 3 a[r + 1] + a[r + 2] + a[r + 3] in each column.
void mix_columns(Planes& planes) {
    const auto next_row = [](std::uint64_t x) {
        return ((x >> 4) & 0x0FFF0FFF0FFF0FFF) | ((x << 12) & 0xF000F000F000F000);
    };
    const auto two_rows_on = [](std::uint64_t x) {
        return ((x >> 8) & 0x00FF00FF00FF00FF) | ((x << 8) & 0xFF00FF00FF00FF00);
    };
    Planes sums;  // a[r] + a[r + 1]
    for (std::size_t i = 0; i < 8; ++i) sums.bits[i] = planes.bits[i] ^ next_row(planes.bits[i]);
    const std::uint64_t* const s = sums.bits;
    // Twice a byte: its bits move up, and what falls out comes back as x^8 = x^4 + x^3 + x + 1.
    const std::uint64_t doubled[8] = {s[7], s[0] ^ s[7], s[1], s[2] ^ s[7], s[3] ^ s[7], s[4], s[5], s[6]};
    for (std::size_t i = 0; i < 8; ++i)
        planes.bits[i] = doubled[i] ^ next_row(planes.bits[i]) ^ two_rows_on(s[i]);
}

void add_key(Planes& planes, const std::uint64_t* key) {
    for (std::size_t i = 0; i < 8; ++i) planes.bits[i] ^= key[i];
}

// The first bytes of one block through the table.
void substitute_bytes(std::uint8_t* bytes, std::size_t size) {
    std::uint8_t blocks[kPlainBytes] = {};
    std::memcpy(blocks, bytes, size);
    Planes planes = planes_of(blocks);
    substitute(planes);
    blocks_of(planes, blocks);
    std::memcpy(bytes, blocks, size);
}

}  // namespace

// FIPS 197, 5.2, for keys of eight words.
void expand_key(const std::uint8_t* key, AesSchedule& schedule) {
    constexpr std::size_t kWord = 4, kKeyWords = kAesKeyBytes / kWord;
    std::uint8_t* const bytes = schedule.rounds[0];
    std::memcpy(bytes, key, kAesKeyBytes);
    std::uint8_t constant = 1;
    for (std::size_t i = kKeyWords; i < sizeof schedule.rounds / kWord; ++i) {
        std::uint8_t word[kWord];
        std::memcpy(word, bytes + (i - 1) * kWord, kWord);
        if (i % kKeyWords == 0) {
            const std::uint8_t first = word[0];
            for (std::size_t j = 0; j + 1 < kWord; ++j) word[j] = word[j + 1];
            word[kWord - 1] = first;
        }
        if (i % 4 == 0) substitute_bytes(word, kWord);
        if (i % kKeyWords == 0) {
            word[0] ^= constant;
            constant = static_cast<std::uint8_t>(constant << 1);  // seven are used: none leaves the byte
        }
        for (std::size_t j = 0; j < kWord; ++j)
            bytes[i * kWord + j] = bytes[(i - kKeyWords) * kWord + j] ^ word[j];
    }
}

std::uint8_t substituted(std::uint8_t byte) {
    substitute_bytes(&byte, 1);
    return byte;
}

PlainAes::PlainAes(const AesSchedule& schedule) {
    std::uint8_t blocks[kPlainBytes];
    for (std::size_t round = 0; round <= kAesRounds; ++round) {
        for (std::size_t block = 0; block < kPlainBlocks; ++block)
            std::memcpy(blocks + block * kAesBlockBytes, schedule.rounds[round], kAesBlockBytes);
        const Planes planes = planes_of(blocks);
        std::memcpy(keys_[round], planes.bits, sizeof planes.bits);
    }
}

void PlainAes::encrypt(std::uint8_t (&blocks)[kPlainBytes]) const {
    Planes planes = planes_of(blocks);
    add_key(planes, keys_[0]);
    for (std::size_t round = 1; round < kAesRounds; ++round) {
        substitute(planes);
        shift_rows(planes);
        mix_columns(planes);
        add_key(planes, keys_[round]);
    }
    substitute(planes);
    shift_rows(planes);
    add_key(planes, keys_[kAesRounds]);
    blocks_of(planes, blocks);
}

}  // namespace tsqp
