// The system's pages behind the workspace and the gradients. Only for files that are compiled once.
#pragma once

#include "panels.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pacl {
namespace {

// Fewer page faults in memory that is written for the first time; a hint that cannot fail.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const int64_t huge = 2 << 20, first = round_up((int64_t)memory, huge), last = ((int64_t)memory + bytes) / huge * huge;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// True where the system has yet to make the page of `address`; false where it does not say.
bool is_fresh([[maybe_unused]] const char* address) {
#if defined(__linux__)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  unsigned char present = 0;
  return mincore((void*)((int64_t)address / page * page), page, &present) == 0 && !(present & 1);
#else
  return false;
#endif
}

// Takes the page faults of memory that is about to be written for the first time all at once, in half the time of one
// by one. A hint: where it fails (before Linux 5.14), they come as they are.
void populate([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t first = (int64_t)memory / page * page, last = ((int64_t)memory + bytes - 1) / page * page;
  if (is_fresh((char*)last)) madvise((void*)first, last + page - first, MADV_POPULATE_WRITE);
#endif
}

inline int64_t gradient_row_bytes(const CompatibilityParams& p) { return p.dim * (p.dtype == Dtype::float32 ? 4 : 2); }

inline int64_t gradient_bytes(const CompatibilityParams& p) {
  return p.images * p.patches_per_image * gradient_row_bytes(p);
}

// The same call, told whether the system has yet to make the pages of the patches' gradient.
inline CompatibilityParams with_fresh_gradient(CompatibilityParams p) {
  p.fresh_gradient = p.grad_patches && is_fresh((const char*)p.grad_patches + gradient_bytes(p) - 1);
  return p;
}

}  // namespace
}  // namespace pacl
