// Compiled once for each epilogue and dtype: PACL_EPILOGUE and PACL_ELEMENT, PACL_TABLE the name in kernels.h.

#include <cstddef>
#include <iterator>
#include <utility>

#include "kernels.h"
#include "score.cuh"

namespace pacl::cuda {
namespace {

template <bool kPacked, const auto& kCompiled, std::size_t... kIndex>
const void* find(int width, std::index_sequence<kIndex...>) {
  const void* found = nullptr;
  ((width == kCompiled[kIndex]
        ? (found = reinterpret_cast<const void*>(
               &score_kernel<kCompiled[kIndex], kPacked, PACL_ELEMENT, Epilogue::PACL_EPILOGUE>))
        : nullptr),
   ...);
  return found;
}

template <bool kPacked, const auto& kCompiled>
const void* find(int width) {
  return find<kPacked, kCompiled>(width, std::make_index_sequence<std::size(kCompiled)>());
}

}  // namespace

const void* PACL_TABLE(int width, bool packed) {
  if constexpr (Epilogue::PACL_EPILOGUE == Epilogue::forward_safe)
    return packed ? find<true, kSafePackedWidths>(width) : find<false, kSafeWidths>(width);
  else if constexpr (is_pooled(Epilogue::PACL_EPILOGUE))
    return find<false, kPooledWidths>(width);
  else if constexpr (reads_attention(Epilogue::PACL_EPILOGUE))
    return find<false, kGramWidths>(width);
  else
    return packed ? find<true, kPackedWidths>(width) : find<false, kWidths>(width);
}

}  // namespace pacl::cuda
