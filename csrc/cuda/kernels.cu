// The table of kernels of PACL_TABLE_EPILOGUE, compiled once for each line of epilogues.def with its DTYPE in
// PACL_TABLE_DTYPE.

#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "score.cuh"

#define PACL_JOIN(A, B) A##_##B
#define PACL_TABLE(EPILOGUE) PACL_JOIN(EPILOGUE, kernel)  // the name in kernels.h

namespace pacl::cuda {
namespace {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
constexpr Epilogue kEpilogue = Epilogue::PACL_TABLE_EPILOGUE;

template <class T, bool kPacked, const auto& kCompiled, std::size_t... kIndex>
const void* find(int width, std::index_sequence<kIndex...>) {
  const void* found = nullptr;
  ((width == kCompiled[kIndex]
        ? (found = reinterpret_cast<const void*>(&score_kernel<kCompiled[kIndex], kPacked, T, kEpilogue>))
        : nullptr),
   ...);
  return found;
}

template <class T, bool kPacked, const auto& kCompiled>
const void* find(int width) {
  return find<T, kPacked, kCompiled>(width, std::make_index_sequence<std::size(kCompiled)>());
}

template <class T>
const void* find(int width, bool packed) {
  if constexpr (is_only_bfloat16(kEpilogue) && std::is_same_v<T, float16>)
    return nullptr;
  else if constexpr (kEpilogue == Epilogue::dot_forward_running_max)
    return packed ? find<T, true, kRunningMaxPackedWidths>(width) : find<T, false, kRunningMaxWidths>(width);
  else if constexpr (takes_whole_images(kEpilogue))
    return find<T, false, kWholeImageWidths>(width);
  else if constexpr (reads_attention(kEpilogue))
    return find<T, false, kFromAttentionWidths>(width);
  else
    return packed ? find<T, true, kPackedWidths>(width) : find<T, false, kWidths>(width);
}

}  // namespace

const void* PACL_TABLE(PACL_TABLE_EPILOGUE)(bool half, int width, bool packed) {
  return half ? find<float16>(width, packed) : find<PACL_TABLE_DTYPE>(width, packed);
}

}  // namespace pacl::cuda
