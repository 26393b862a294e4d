// The compiled kernels by width. kernels.cu defines one table per epilogue and dtype; launch.cu chooses from them.

#pragma once

namespace pacl::cuda {

// `<epilogue>_<dtype>(width, packed)` returns a kernel, or null if that width is not compiled.
#define PACL_EPILOGUE(NAME, DTYPE)                    \
  const void* NAME##_float16(int width, bool packed); \
  const void* NAME##_##DTYPE(int width, bool packed);
#include "epilogues.def"

}  // namespace pacl::cuda
