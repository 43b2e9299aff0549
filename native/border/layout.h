// The bytes both processes agree on. tsqp_shm/shm/layout.py is the twin; tests/test_layout.py compares them.
//
//   byte 0      header      magic, version (stored last), epoch, total bytes, plan digest
//   byte 64     secret      of the two sides of a session, for proofs over the doorbell's socket
//   byte 512    invitation  its length, then JSON: what the GPU process has to know to take part
//   byte 4096   control     one word per pair of cache lines, each written by one side only
//   byte 6144   progress    counters of the TEE, for whoever watches; no role reads them
//   byte 8192   submission  64 records of 64 bytes, TEE -> GPU
//   byte 12288  completion  64 records of 64 bytes, GPU -> TEE
//   byte 16384  slots       each 4 KiB aligned; where they lie is in the plan, never in shared memory
#pragma once

#include <cstddef>
#include <cstdint>

namespace tsqp {

inline constexpr std::uint64_t kMagic = 0x31304d4853505154;  // "TQPSHM01", little endian
inline constexpr std::uint64_t kLayoutVersion = 4;

inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::size_t kRecordBytes = 64;
inline constexpr std::size_t kRingDepth = 64;

struct Header {
    std::uint64_t magic;
    std::uint64_t version;  // 0: not ready
    std::uint64_t epoch;
    std::uint64_t total_bytes;
    std::uint8_t digest[32];
};
static_assert(offsetof(Header, magic) == 0);
static_assert(offsetof(Header, version) == 8);
static_assert(offsetof(Header, epoch) == 16);
static_assert(offsetof(Header, total_bytes) == 24);
static_assert(offsetof(Header, digest) == 32);
static_assert(sizeof(Header) == 64);

// Written where a socket joins the two sides, before the version word.
inline constexpr std::size_t kSecretOffset = sizeof(Header);
inline constexpr std::size_t kSecretBytes = 32;

// Written before the version word, which publishes it with the rest of the header. What lies between the
// header and it is left for others.
inline constexpr std::size_t kInvitationLengthOffset = 512;
inline constexpr std::size_t kInvitationOffset = kInvitationLengthOffset + sizeof(std::uint64_t);
inline constexpr std::size_t kMaxInvitationBytes = 3500;
static_assert(kSecretOffset + kSecretBytes <= kInvitationLengthOffset);
static_assert(kInvitationOffset + (kMaxInvitationBytes + 7) / 8 * 8 <= kPageBytes);

// A word and the padding that keeps the adjacent-line prefetcher of one side off the word of the other.
struct alignas(128) ControlWord {
    std::uint64_t value;
};

struct Control {
    ControlWord submission_tail;    // written by TEE: records submitted
    ControlWord submission_head;    // written by GPU: records taken
    ControlWord submission_parked;  // written by GPU: odd while it is parked
    ControlWord completion_tail;    // written by GPU: records completed
    ControlWord completion_head;    // written by TEE: records taken
    ControlWord completion_parked;  // written by TEE: odd while it is parked
    ControlWord tee_heartbeat;      // written by TEE: grows while it lives
    ControlWord gpu_heartbeat;      // written by GPU: grows while it lives
};
static_assert(offsetof(Control, submission_tail) == 0);
static_assert(offsetof(Control, submission_head) == 128);
static_assert(offsetof(Control, submission_parked) == 256);
static_assert(offsetof(Control, completion_tail) == 384);
static_assert(offsetof(Control, completion_head) == 512);
static_assert(offsetof(Control, completion_parked) == 640);
static_assert(offsetof(Control, tee_heartbeat) == 768);
static_assert(offsetof(Control, gpu_heartbeat) == 896);

inline constexpr std::size_t kControlOffset = kPageBytes;
inline constexpr std::size_t kProgressOffset = kControlOffset + kPageBytes / 2;
inline constexpr std::size_t kProgressBytes = 128;  // 8-byte words, named in tsqp_shm/shm/progress.py
static_assert(kControlOffset + sizeof(Control) <= kProgressOffset);
static_assert(kProgressOffset + kProgressBytes <= 2 * kPageBytes);
inline constexpr std::size_t kSubmissionRingOffset = 2 * kPageBytes;
inline constexpr std::size_t kCompletionRingOffset = 3 * kPageBytes;
inline constexpr std::size_t kSlotsOffset = 4 * kPageBytes;
static_assert(kRingDepth * kRecordBytes <= kPageBytes);
static_assert((kRingDepth & (kRingDepth - 1)) == 0);

// A slot holds typed bytes; the plan says which.
enum class Dtype : std::uint32_t { bf16 = 1, f32 = 2, i32 = 3, u32 = 4 };

}  // namespace tsqp
