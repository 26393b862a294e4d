// The kernels, written once on the vectors of simd.h and compiled once per instruction set.
// They use no std:: templates and no shared inline functions: the linker could keep an AVX-512 copy for every machine.

#include "kernels.h"

#include "backward.h"
#include "fma_peak.h"
#include "forward.h"
#include "upsample.h"
#if !defined(PACL_PAIRS)
#include "loss.h"  // the loss is that of float32 for every dtype
#endif

namespace {

using namespace pacl;

template <class Op>
constexpr Kernels table() {
  return {
      .panel = kPanel,
      .tile_rows = Op::kMatrix ? 2 * Op::kRows : Op::kRows,
      .tile_columns = Op::kColumns,
      .pair = Op::kPair,
      .inner = Op::kInner,
      .matrix = Op::kMatrix,
      .pack_rows = pack_rows<Op>,
      .pack_texts = pack_texts<Op>,
      .forward = forward<Op>,
      .weights = weights<Op>,
      .add_empty_image = add_empty_image,
      .patches_product = patches_product<Op>,
      .sum_rows = sum_rows<Op>,
      .means_product = means_product<Op>,
      .texts_product = texts_product<Op>,
      .finish_patches = finish_patches<Op>,
      .finish_texts = finish_texts,
      .independent_fmas = independent_fmas<Op>,
      .max_pack_texts = max_pack_texts,
      .max_sort = max_sort,
      .max_patches = max_patches,
      .max_texts = max_texts,
      .max_finish_texts = max_finish_texts,
#if !defined(PACL_PAIRS)
      .loss_rows = loss_rows,
      .loss_columns = loss_columns,
      .loss_value = loss_value,
      .loss_gradient = loss_gradient,
#endif
      .upsample_argmax = upsample_argmax,
  };
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
