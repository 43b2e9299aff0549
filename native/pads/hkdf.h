// HKDF with SHA-256, for keys that are derived from a seed.
//
// What it works in is the caller's, so that it lies in memory of his choice and is wiped with it.
//
// Source: FIPS 180-4 (SHA-256), RFC 2104 (HMAC), RFC 5869 (HKDF).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tsqp {

inline constexpr std::size_t kDigestBytes = 32;
// Of RFC 5869, 2.3.
inline constexpr std::size_t kMaxExpandedBytes = 255 * kDigestBytes;

// What a derivation leaves behind is secret.
struct HashWork {
    std::uint32_t state[8], schedule[64];
    std::uint8_t block[64], padded_key[64], digest[kDigestBytes];
    std::uint64_t size_bytes;
};

// prk [32].
void hkdf_extract(HashWork& work, std::string_view salt, std::string_view input, std::uint8_t* prk);

// out [size]. Raises invalid_argument for more than kMaxExpandedBytes.
void hkdf_expand(HashWork& work, const std::uint8_t* prk, std::string_view info, std::uint8_t* out,
                 std::size_t size);

}  // namespace tsqp
