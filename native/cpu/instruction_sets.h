// The instruction sets that this machine has and that this library has code for.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace tsqp {

// Their names, slowest first; scalar is always there. The first call asks the operating system for the state
// of the tiles, which it then keeps for every thread of this process.
std::vector<std::string_view> instruction_sets();

// What products of bytes are made with, which a machine may lack that has AVX-512 or the tiles for bf16.
bool has_vnni();
bool has_integer_tiles();

// What AES is made with: blocks one by one, and four in a register, which a machine may lack that has AVX-512.
bool has_aes();
bool has_vaes();

// Raises invalid_argument, with the names of those that there are, unless `name` is one of them; `asked_by`
// is in the message.
void require_instruction_set(std::string_view name, std::string_view asked_by);

}  // namespace tsqp
