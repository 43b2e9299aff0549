// The keys of a session's pads, one for each Linear, derived from a seed that nobody keeps.
//
//   PRK       HKDF-Extract(salt = "tsqp-shm pads 1", seed)
//   key       HKDF-Expand(PRK, "pad key" | context | u32 index of the Linear, 32)
//   key id    HKDF-Expand(PRK, "key id" | context, 16): public, tells keys apart
//   context   u16 length | session | u16 length | digest of the model | u64 key epoch; numbers big-endian
//
// The schedules of all keys lie in one mapping of memory for secrets (secret_pages.h); what they are derived
// with lies there too, until it is wiped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "pads/aes.h"
#include "pads/secret_pages.h"

namespace tsqp {

class PadKeys {
  public:
    // seed: 32 bytes, or null: of the system's generator. Raises system_error where the memory for it cannot
    // be had, invalid_argument for no Linear or 2^32 of them, or for a session or digest of 64 KiB.
    PadKeys(std::string_view session, std::string_view model_digest, std::uint64_t key_epoch,
            std::size_t num_linears, const std::uint8_t* seed);

    std::size_t num_linears() const { return num_linears_; }
    const std::string& key_id() const { return key_id_; }

    // Of pad_kernels.h, by the kernels in use; both from any number of threads at once. Raise logic_error in
    // a forked child, where the keys are wiped, and out_of_range for a Linear that there is not.
    void draw(std::size_t linear, std::uint64_t row, std::size_t inputs, std::uint32_t* r) const;
    void mask(std::size_t linear, std::uint64_t row, std::size_t inputs, std::int32_t* integers,
              std::uint32_t* m, std::uint32_t* copy) const;

  private:
    struct Secrets;
    Secrets& secrets() const;
    void derive(const std::string& context, const std::uint8_t* seed);
    const AesSchedule& schedule(std::size_t linear) const;

    std::size_t num_linears_;
    SecretPages pages_;
    std::string key_id_;
};

}  // namespace tsqp
