// The arithmetic `w8`: a Linear as integers, of which every bit is the same on every instruction set, number
// of threads, batch and cut into chunks. Nothing in it depends on the order of a sum of floats.
//
//   weight row   sw = max|W| / 127 (f32; 1 where that is zero),  Wq = rint(W / sw), held within +-127
//   row x        s = largest f32 <= 32,639 / max|x|,  xq = rint(x * s)      two more rules: quantise.h
//   sum          y = sum_k xq[k] Wq[j, k],  |y| < 2^30 - 1
//   result       f32(y) * (sw[j] / s), then + bias, each rounded once
//
// rint is to nearest, ties to even.
//
// xq crosses to the products as unsigned digits: xq + 2^(8 D - 1) = sum_d 256^d digit_d, so each digit row is
// a product of unsigned with signed bytes whose sums fit 32 bits, and y is what they give modulo 2^32 when
// 2^(8 D - 1) times the sum of Wq[j, :] is taken off. Never by instructions that saturate (VPMADDUBSW,
// VPDPBUSDS).
//
// Between two processes the same product crosses in the field of p = 2^31 - 1: m = xq mod p, y = m W mod p,
// both in [0, p). Centred, m is xq again; for any other m, a sum that does not fit 32 bits is put together in
// 64.
//
// Packed weights lie in panels of 64 outputs, within a panel in fours along the inputs:
//
//     panel p, four j, output c, byte b   =   Wq[64 p + c, 4 j + b]      int8; what is past the end is zero
//
// which the dot product and the tile instructions both read, and which one row of decode reads front to back.
//
// All but what crosses is private memory: rows are read more than once, which memory of the other side may
// not be. Of what crosses each word is read once, and written once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace tsqp {

inline constexpr std::size_t kPanelOutputs = 64;
// Inputs are padded with zeros to whole tiles of this depth.
inline constexpr std::size_t kDepthOfTile = 64;
inline constexpr std::size_t kMaxDigits = 4;
// 255 * 127 * inputs < 2^31: the sums of one digit row.
inline constexpr std::size_t kMaxFieldInputs = 66'311;
// What a row of two digits, and of three, may hold: 127 in each balanced digit.
inline constexpr std::uint32_t kTwoDigits = 32'639, kThreeDigits = 8'355'711;
inline constexpr std::uint32_t kSumLimit = (1u << 30) - 1;
inline constexpr std::uint32_t kPrime = (1u << 31) - 1;

namespace {  // kernels of several instruction sets compile it: see kernels/lanes.h

// x mod p of x < 2 p: the difference wraps where x is less than p.
constexpr std::uint32_t reduced(std::uint32_t x) {
    const std::uint32_t less = x - kPrime;
    return less < x ? less : x;
}

}  // namespace

// What is added to integers of so many digits, so that none is negative.
constexpr std::uint32_t digit_offset(std::size_t digits) { return std::uint32_t{1} << (8 * digits - 1); }

constexpr std::size_t padded_inputs(std::size_t inputs) {
    return (inputs + kDepthOfTile - 1) / kDepthOfTile * kDepthOfTile;
}

// What is known of integers xq: max|xq| and sum|xq|.
struct Magnitudes {
    std::uint32_t largest;
    std::uint64_t sum;
};

// What is known of a row of weights: its scale, the sum of Wq and that of Wq^2. A row with a NaN or an
// infinity is not finite, and its Wq are unspecified.
struct WeightRow {
    float scale;
    std::int32_t sum;
    std::uint32_t squares;
    bool is_finite;
};

// sums[r, c] = sum_k digits[r, k] * panel[k, c], as 32 bits.
//
//   Shapes:   digits [rows, depth] u8, rows `stride` bytes apart; panel [depth / 4, 64, 4] i8; sums [rows,
//   64]
//             u32. depth is whole tiles; panel and sums begin at a cache line.
struct MultiplyArgs {
    const std::uint8_t* digits;
    std::size_t stride, rows;
    const std::int8_t* panel;
    std::size_t depth;
    std::uint32_t* sums;
};

// One row's results of one panel, out of the sums of its digit rows.
//
//   Shapes:   digits[d] [64]: the sums of digit d; column_sums, scales, bias [64] of the panel, bias or null;
//             out [columns].
//   Numerics: y = sum_d 256^d digits[d] - offset * column_sums mod 2^32; out = f32(y) * (scales / scale) +
//   bias.
//             A NaN is always the quiet NaN 0x7FC00000.
struct ResultArgs {
    const std::uint32_t* digits[kMaxDigits];
    std::size_t num_digits;
    std::uint32_t offset;
    const std::int32_t* column_sums;
    const float* scales;
    const float* bias;
    float scale;
    float* out;
    std::size_t columns;
};

// One row's field elements of one panel, out of the sums of its digit rows.
//
//   Shapes:   as of ResultArgs; out [columns], in [0, p).
//   Numerics: y = sum_d 256^d digits[d] - 2^(8 D - 1) * column_sums mod p, exact for all digits. Where the
//   row
//             is narrow, that is |y| < p, in 32 bits.
struct ResidueArgs {
    const std::uint32_t* digits[kMaxDigits];
    std::size_t num_digits;
    const std::int32_t* column_sums;
    bool is_narrow;
    std::uint32_t* out;
    std::size_t columns;
};

// The field elements of rows that have two digits each and are narrow, of a whole panel: what `multiply` and
// `residue` give one after the other, with no sums in between.
//
//   Shapes: digits [2 rows, depth], each row's two side by side, `stride` bytes apart; panel as of
//           MultiplyArgs; column_sums [64]; out [rows, 64], rows `out_stride` apart.
struct PairsArgs {
    const std::uint8_t* digits;
    std::size_t stride, rows;
    const std::int8_t* panel;
    std::size_t depth;
    const std::int32_t* column_sums;
    std::uint32_t* out;
    std::size_t out_stride;
};

struct FieldKernels {
    const char* name;
    // max|x| as the bits of an f32: 0x7F800000 or more where there is a NaN or an infinity.
    std::uint32_t (*largest_bits)(const float* x, std::size_t size) noexcept;
    // integers[i] = rint(f32(x[i] * scale)), |x * scale| < 2^23.
    Magnitudes (*quantise)(const float* x, std::size_t size, float scale, std::int32_t* integers) noexcept;
    // integers[i] = m[i] mod p, centred: within +-(p - 1) / 2. The sum is that of the magnitudes only while the
    // largest is at most kThreeDigits.
    Magnitudes (*centre)(const std::uint32_t* m, std::size_t size, std::int32_t* integers) noexcept;
    std::uint64_t (*sum_of_squares)(const std::int32_t* integers, std::size_t size) noexcept;
    // digits[i] = (integers[i] + offset) >> shift, mod 256.
    void (*write_digit)(const std::int32_t* integers, std::size_t size, std::uint32_t offset, unsigned shift,
                        std::uint8_t* digits) noexcept;
    WeightRow (*quantise_f32_weights)(const float* weight, std::size_t size, std::int8_t* to) noexcept;
    WeightRow (*quantise_bf16_weights)(const std::uint16_t* weight, std::size_t size,
                                       std::int8_t* to) noexcept;
    void (*multiply)(const MultiplyArgs& args) noexcept;
    void (*result)(const ResultArgs& args) noexcept;
    void (*residue)(const ResidueArgs& args) noexcept;
    // Null where sums have to be stored anyway.
    void (*multiply_pairs)(const PairsArgs& args) noexcept;
};

extern const FieldKernels kScalarField;  // field_scalar.cpp: the oracle
#if defined(__x86_64__)
extern const FieldKernels kAvx2Field;        // field_avx2.cpp
extern const FieldKernels kAvx512VnniField;  // field_avx512vnni.cpp
extern const FieldKernels kAmxField;         // field_amx.cpp
#endif

// What this machine can run, slowest first; scalar is always there.
std::vector<const FieldKernels*> supported_field_kernels();

// What goes with an instruction set: the dot product of bytes is asked for by itself, as machines with
// AVX-512 may lack it. Raises invalid_argument for a set that this machine does not have.
const FieldKernels& field_kernels_of(std::string_view instruction_set);

}  // namespace tsqp
