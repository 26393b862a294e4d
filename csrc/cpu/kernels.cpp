// The fused functions, written once on the vectors of simd.h and compiled once per instruction set.
// No std:: templates and no shared inline functions: the linker could keep an AVX-512 copy of them for everyone.

#include "kernels.h"

#include "backward.h"
#include "fma_peak.h"
#include "forward.h"
#include "upsample.h"

namespace {

using namespace pacl;

template <class Op>
constexpr Kernels table() {
  return {kPanel,
          Op::kMatrix ? 2 * Op::kRows : Op::kRows,
          Op::kColumns,
          Op::kPair,
          Op::kInner,
          Op::kMatrix,
          pack_rows<Op>,
          pack_texts<Op>,
          forward<Op>,
          weights<Op>,
          patches_product<Op>,
          sum_rows<Op>,
          means_product<Op>,
          texts_product<Op>,
          finish_patches<Op>,
          finish_texts,
          independent_fmas<Op>,
          max_pack_texts,
          max_sort,
          max_patches,
          max_texts,
          max_finish_texts,
          upsample_argmax};
}

}  // namespace

namespace pacl {
namespace PACL_ISA {
extern const Kernels kernels, pair_kernels;
#if defined(PACL_PAIRS)
const Kernels pair_kernels = table<BFloat16>();
#else
const Kernels kernels = table<Float32>();
#endif
}  // namespace PACL_ISA
}  // namespace pacl
