#include "pads/keys.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "kernels/dispatch.h"
#include "pads/hkdf.h"
#include "pads/pad_kernels.h"
#include "pads/wipe.h"

namespace tsqp {
namespace {

constexpr std::size_t kSeedBytes = 32, kKeyIdBytes = 16;
constexpr std::string_view kSalt = "tsqp-shm pads 1";
constexpr std::uint64_t kPresent = 1;

std::string big_endian(std::uint64_t value, std::size_t size) {
    std::string bytes;
    for (std::size_t i = size; i-- > 0;) bytes += static_cast<char>(value >> (8 * i));
    return bytes;
}

std::string with_length(std::string_view bytes, const char* name) {
    if (bytes.size() > UINT16_MAX)
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(bytes.size()) +
                                    " bytes, expected at most 65535");
    return big_endian(bytes.size(), 2) + std::string(bytes);
}

std::size_t checked(std::size_t num_linears) {
    if (num_linears == 0 || num_linears > UINT32_MAX)
        throw std::invalid_argument("num_linears: got " + std::to_string(num_linears) +
                                    ", expected 1 to 2^32 - 1");
    return num_linears;
}

std::string hex(const std::uint8_t* bytes, std::size_t size) {
    constexpr char kDigits[] = "0123456789abcdef";
    std::string digits;
    for (std::size_t i = 0; i < size; ++i) {
        digits += kDigits[bytes[i] >> 4];
        digits += kDigits[bytes[i] & 15];
    }
    return digits;
}

void fill_with_random(std::uint8_t* to, std::size_t size) {
    for (std::size_t done = 0; done < size;) {
        const ssize_t count = getrandom(to + done, size - done, 0);
        if (count < 0 && errno != EINTR)
            throw std::system_error(errno, std::generic_category(), "the system's generator of random bytes");
        if (count > 0) done += static_cast<std::size_t>(count);
    }
}

}  // namespace

struct PadKeys::Secrets {
    std::uint64_t is_present;  // 0 in a forked child
    struct {
        std::uint8_t seed[kSeedBytes], root[kDigestBytes], key[kAesKeyBytes];
        HashWork work;
    } derivation;
    AesSchedule schedules[1];  // one for each Linear
};

PadKeys::PadKeys(std::string_view session, std::string_view model_digest, std::uint64_t key_epoch,
                 std::size_t num_linears, const std::uint8_t* seed)
    : num_linears_(checked(num_linears)), pages_(sizeof(Secrets) + (num_linears - 1) * sizeof(AesSchedule)) {
    derive(with_length(session, "session") + with_length(model_digest, "model_digest") +
               big_endian(key_epoch, 8),
           seed);
    burn_stack();
    secrets().is_present = kPresent;
}

[[gnu::noinline]] void PadKeys::derive(const std::string& context, const std::uint8_t* seed) {
    auto& with = secrets().derivation;
    if (seed == nullptr)
        fill_with_random(with.seed, kSeedBytes);
    else
        std::memcpy(with.seed, seed, kSeedBytes);
    hkdf_extract(with.work, kSalt, {reinterpret_cast<const char*>(with.seed), kSeedBytes}, with.root);
    std::uint8_t id[kKeyIdBytes];
    hkdf_expand(with.work, with.root, "key id" + context, id, sizeof id);
    key_id_ = hex(id, sizeof id);
    for (std::size_t linear = 0; linear < num_linears_; ++linear) {
        hkdf_expand(with.work, with.root, "pad key" + context + big_endian(linear, 4), with.key,
                    sizeof with.key);
        expand_key(with.key, secrets().schedules[linear]);
    }
    wipe(&with, sizeof with);
}

PadKeys::Secrets& PadKeys::secrets() const { return *reinterpret_cast<Secrets*>(pages_.data()); }

const AesSchedule& PadKeys::schedule(std::size_t linear) const {
    if (linear >= num_linears_)
        throw std::out_of_range("linear: got " + std::to_string(linear) + ", expected less than " +
                                std::to_string(num_linears_));
    // Pads of a wiped key would be known to everybody.
    if (secrets().is_present != kPresent)
        throw std::logic_error("the keys of pads are wiped in a forked process, which has to make its own");
    return secrets().schedules[linear];
}

void PadKeys::draw(std::size_t linear, std::uint64_t row, std::size_t inputs, std::uint32_t* r) const {
    pad_kernels_of(active_kernels().name).draw({&schedule(linear), row}, inputs, r);
}

void PadKeys::mask(std::size_t linear, std::uint64_t row, std::size_t inputs, std::int32_t* integers,
                   std::uint32_t* m, std::uint32_t* copy) const {
    pad_kernels_of(active_kernels().name)
        .mask({&schedule(linear), row}, {.inputs = inputs, .integers = integers, .m = m, .copy = copy});
}

}  // namespace tsqp
