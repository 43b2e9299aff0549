// Which kernel table is in use. Chosen at first use: the best one this machine runs, or the one TSQP_SHM_ISA
// names.
#pragma once

#include <string_view>
#include <vector>

#include "kernels/kernels.h"

namespace tsqp {

// The tables this machine can run, slowest first; scalar is always there.
std::vector<const KernelTable*> supported_kernels();

// Raises invalid_argument, each time, while TSQP_SHM_ISA names a table this machine does not have.
const KernelTable& active_kernels();

// Raises invalid_argument if this machine does not have it. Calls already running keep their table.
void use_kernels(std::string_view name);

}  // namespace tsqp
