#pragma once

#include <vector>

#include "kernels.h"

namespace pacl {

struct Isa {
  const char* name;
  const Kernels *float_kernels, *bfloat16_kernels;
};

const std::vector<Isa>& isas();  // the instruction sets that this machine runs, the best one last
const Isa& select_isa();         // throws std::invalid_argument if PACL_CPU_ISA names none of them

}  // namespace pacl
