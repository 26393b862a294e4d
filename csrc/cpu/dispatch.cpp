// Which instruction set runs: the best that processor and operating system offer, or what PACL_CPU_ISA names.

#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pacl {

#define PACL_DECLARE(isa)                     \
  namespace isa {                             \
  extern const Kernels kernels, pair_kernels; \
  }
PACL_DECLARE(baseline)
PACL_DECLARE(avx2)
PACL_DECLARE(avx512)
PACL_DECLARE(avx512bf16)

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found{{"baseline", &baseline::kernels, &baseline::kernels}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", &avx2::kernels, &avx2::kernels});
    if (__builtin_cpu_supports("avx512f")) {
      found.push_back({"avx512", &avx512::kernels, &avx512::kernels});
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl"))
        found.push_back({"avx512bf16", &avx512::kernels, &avx512bf16::pair_kernels});
    }
#endif
    return found;
  }();
  return all;
}

const Isa& select_isa() {
  const char* wanted = std::getenv("PACL_CPU_ISA");
  if (!wanted || !*wanted) return isas().back();
  std::string names;
  for (const Isa& isa : isas()) {
    if (std::string(wanted) == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("PACL_CPU_ISA is '" + std::string(wanted) +
                              "', expected one of those this machine has: " + names);
}

const Kernels& select_kernels(Dtype dtype, int64_t dim) {
  const Isa& isa = select_isa();
  // Below one panel of pairs most of the product would be padding: widened to float32 it costs no more and rounds less.
  return dtype == Dtype::bfloat16 && dim >= 64 ? *isa.bfloat16_kernels : *isa.float_kernels;
}

}  // namespace pacl
