// The compiled kernels by width. kernels.cu defines one table per epilogue; launch.cu chooses from them.

#pragma once

namespace pacl::cuda {

// `<epilogue>_kernel(half, width, packed)` returns the kernel for float16 or bfloat16, or null if it is not compiled.
#define PACL_EPILOGUE(NAME, DTYPE) const void* NAME##_kernel(bool half, int width, bool packed);
#include "epilogues.def"

}  // namespace pacl::cuda
