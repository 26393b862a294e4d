// Huge pages and page faults of the workspace and the gradients. Include only in files compiled once.
#pragma once

#include "patches.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pacl {
namespace {

// Requests huge pages, for fewer page faults in memory written for the first time. It is a hint and cannot fail.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  const int64_t huge = 2 << 20, first = round_up((int64_t)memory, huge), last = ((int64_t)memory + bytes) / huge * huge;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Returns true if the page of `address` is not populated yet, false if it is or the system does not tell.
bool is_fresh([[maybe_unused]] const char* address) {
#if defined(__linux__)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  unsigned char present = 0;
  return mincore((void*)((int64_t)address / page * page), page, &present) == 0 && !(present & 1);
#else
  return false;
#endif
}

// Takes the page faults of memory about to be written for the first time all at once, in half the time. It is a hint:
// if it fails (before Linux 5.14), the faults come one by one.
void populate([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t first = (int64_t)memory / page * page, last = ((int64_t)memory + bytes - 1) / page * page;
  if (is_fresh((char*)last)) madvise((void*)first, last + page - first, MADV_POPULATE_WRITE);
#endif
}

inline int64_t gradient_row_bytes(const CompatibilityParams& p) { return p.dim * (p.dtype == Dtype::float32 ? 4 : 2); }

inline int64_t gradient_bytes(const CompatibilityParams& p) { return all_patches(p) * gradient_row_bytes(p); }

// Returns the call with fresh_gradient set if the pages of the patches' gradient are not populated yet.
inline CompatibilityParams with_fresh_gradient(CompatibilityParams p) {
  p.fresh_gradient =
      p.grad_patches && gradient_bytes(p) > 0 && is_fresh((const char*)p.grad_patches + gradient_bytes(p) - 1);
  return p;
}

}  // namespace
}  // namespace pacl
