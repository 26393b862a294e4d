// The table of kernels of PACL_TABLE_EPILOGUE and PACL_TABLE_DTYPE, compiled once for each pair in epilogues.def.

#include <cstddef>
#include <iterator>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "score.cuh"

#define PACL_JOIN(A, B) A##_##B
#define PACL_TABLE(EPILOGUE, DTYPE) PACL_JOIN(EPILOGUE, DTYPE)  // the name in kernels.h

namespace pacl::cuda {
namespace {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
constexpr Epilogue kEpilogue = Epilogue::PACL_TABLE_EPILOGUE;

template <bool kPacked, const auto& kCompiled, std::size_t... kIndex>
const void* find(int width, std::index_sequence<kIndex...>) {
  const void* found = nullptr;
  ((width == kCompiled[kIndex] ? (found = reinterpret_cast<const void*>(
                                      &score_kernel<kCompiled[kIndex], kPacked, PACL_TABLE_DTYPE, kEpilogue>))
                               : nullptr),
   ...);
  return found;
}

template <bool kPacked, const auto& kCompiled>
const void* find(int width) {
  return find<kPacked, kCompiled>(width, std::make_index_sequence<std::size(kCompiled)>());
}

}  // namespace

const void* PACL_TABLE(PACL_TABLE_EPILOGUE, PACL_TABLE_DTYPE)(int width, bool packed) {
  if constexpr (is_only_bfloat16(kEpilogue) && std::is_same_v<PACL_TABLE_DTYPE, float16>)
    return nullptr;
  else if constexpr (kEpilogue == Epilogue::dot_forward_running_max)
    return packed ? find<true, kRunningMaxPackedWidths>(width) : find<false, kRunningMaxWidths>(width);
  else if constexpr (takes_whole_images(kEpilogue))
    return find<false, kWholeImageWidths>(width);
  else if constexpr (reads_attention(kEpilogue))
    return find<false, kFromAttentionWidths>(width);
  else
    return packed ? find<true, kPackedWidths>(width) : find<false, kWidths>(width);
}

}  // namespace pacl::cuda
