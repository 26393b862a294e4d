// The choice of the instruction set: the best that processor and operating system offer, or the one PACL_CPU_ISA names.

#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(PACL_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(PACL_ARM_BF16)
#include <sys/auxv.h>
#endif

namespace pacl {

#define PACL_DECLARE(isa)                     \
  namespace isa {                             \
  extern const Kernels kernels, pair_kernels; \
  }
PACL_DECLARE(baseline)
PACL_DECLARE(avx2)
PACL_DECLARE(avx512)
PACL_DECLARE(avx512bf16)
PACL_DECLARE(amx)
PACL_DECLARE(emulated_amx)
PACL_DECLARE(neonbf16)

#if defined(PACL_AMX)
// Returns true if the processor has AMX for bfloat16 and the operating system lets this process use it. Linux refuses
// if a thread's signal stack is too small for the tiles.
bool take_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBFloat16 | kTile)) != (kBFloat16 | kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found{{"baseline", &baseline::kernels, &baseline::kernels}};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back({"avx2", &avx2::kernels, &avx2::kernels});
    if (__builtin_cpu_supports("avx512f")) {
      found.push_back({"avx512", &avx512::kernels, &avx512::kernels});
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl")) {
        found.push_back({"avx512bf16", &avx512::kernels, &avx512bf16::pair_kernels});
#if defined(PACL_AMX)
        if (take_amx()) found.push_back({"amx", &avx512::kernels, &amx::pair_kernels});
#endif
      }
    }
#if defined(PACL_EMULATE_AMX)  // a build for tests; put first, since the last one is the default
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.insert(found.begin(), {"emulated_amx", &avx2::kernels, &emulated_amx::pair_kernels});
#endif
#endif
#if defined(PACL_ARM_BF16)
    constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
    if (getauxval(AT_HWCAP2) & kBFloat16) found.push_back({"neonbf16", &baseline::kernels, &neonbf16::pair_kernels});
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
  // Below one panel of pairs most of the product would be padding. Widened to float32 it costs no more and rounds less.
  return dtype == Dtype::bfloat16 && dim >= 64 ? *isa.bfloat16_kernels : *isa.float_kernels;
}

}  // namespace pacl
