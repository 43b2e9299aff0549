// AES-256 as plain code: what keys are expanded with, and the stream where no instruction makes it.
//
// Nothing here looks a secret up in a table nor branches on one: bytes lie as bits side by side in planes,
// four blocks at a time, and what the standard has as a table is a circuit over them. What it leaves on the
// stack is its callers' to burn (wipe.h).
//
// Source: FIPS 197; counter mode as in NIST SP 800-38A, 6.5.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

inline constexpr std::size_t kAesKeyBytes = 32, kAesBlockBytes = 16, kAesRounds = 14;

// The keys of the rounds, each as the bytes of a block, as FIPS 197 and the processor's instructions have
// them.
struct alignas(64) AesSchedule {
    std::uint8_t rounds[kAesRounds + 1][kAesBlockBytes];
};

void expand_key(const std::uint8_t* key, AesSchedule& schedule);

// One byte through the table SubBytes, as the circuit has it: for tests.
std::uint8_t substituted(std::uint8_t byte);

inline constexpr std::size_t kPlainBlocks = 4, kPlainBytes = kPlainBlocks * kAesBlockBytes;

// Encrypts four blocks at a time with one key.
class PlainAes {
  public:
    explicit PlainAes(const AesSchedule& schedule);

    // In place.
    void encrypt(std::uint8_t (&blocks)[kPlainBytes]) const;

  private:
    std::uint64_t keys_[kAesRounds + 1][8];  // planes
};

}  // namespace tsqp
