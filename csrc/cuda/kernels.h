// The compiled kernels by width: kernels.cu once for each epilogue and dtype, the table in launch.cu.

#pragma once

namespace pacl::cuda {

// Null where that width is not compiled.
#define PACL_KERNELS(NAME) const void* NAME(int width, bool packed)
PACL_KERNELS(forward_bfloat16);
PACL_KERNELS(forward_float16);
PACL_KERNELS(forward_safe_bfloat16);
PACL_KERNELS(forward_safe_float16);
PACL_KERNELS(weights_bfloat16);
PACL_KERNELS(weights_float16);
PACL_KERNELS(cosine_bfloat16);
PACL_KERNELS(cosine_float16);
PACL_KERNELS(cosine_weights_bfloat16);
PACL_KERNELS(cosine_weights_float16);
PACL_KERNELS(attention_bfloat16);
PACL_KERNELS(attention_float16);
PACL_KERNELS(pool_weights_bfloat16);
PACL_KERNELS(pool_weights_float16);
PACL_KERNELS(pool_float16);  // reads and writes nothing of the call's dtype

}  // namespace pacl::cuda
