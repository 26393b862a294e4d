// The place of an image's patches in the caller's arrays: images of equal length, or one after the other.
#pragma once

#include "panels.h"

namespace {

using namespace pacl;

// Returns the last index below `count` whose number, of ascending ones from at most `value` on, is at most `value`.
inline int64_t last_at_most(const int64_t* numbers, int64_t count, int64_t value) {
  int64_t index = 0;
  for (int64_t high = count; high - index > 1;) {
    const int64_t middle = (index + high) / 2;
    (numbers[middle] <= value ? index : high) = middle;
  }
  return index;
}

// Returns the number of patches of an image, masked ones included.
inline int64_t patches_of(const CompatibilityParams& p, int64_t image) {
  return p.patch_starts ? p.patch_starts[image + 1] - p.patch_starts[image] : p.patches_per_image;
}

// Returns the number of patches before `image`, which may be the end. Its patch n has this number plus n.
inline int64_t first_patch(const CompatibilityParams& p, int64_t image) {
  return p.patch_starts ? p.patch_starts[image] : image * p.patches_per_image;
}

inline int64_t all_patches(const CompatibilityParams& p) { return first_patch(p, p.images); }

// Returns the offset of an image's first patch in p.patches.
inline int64_t image_offset(const CompatibilityParams& p, int64_t image) {
  return p.patch_starts ? p.patch_starts[image] * p.patch_strides.row : image * p.patch_strides.image;
}

// Returns the mask of an image's first patch, or null.
inline const uint8_t* image_mask(const CompatibilityParams& p, int64_t image) {
  if (!p.mask) return nullptr;
  return p.mask + (p.patch_starts ? p.patch_starts[image] * p.mask_strides.row : image * p.mask_strides.image);
}

// Returns the number of patches of `image` that are in a block of the max form's backward.
inline int64_t block_patches(const CompatibilityParams& p, const MaxImages& images, int64_t image) {
  return least(images.patches, patches_of(p, image) - images.patch_first);
}

// Returns the number of patches of the block before those of `image`.
inline int64_t block_patch(const CompatibilityParams& p, const MaxImages& images, int64_t image) {
  return first_patch(p, image) - first_patch(p, images.first);
}

}  // namespace
