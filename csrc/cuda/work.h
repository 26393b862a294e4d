// The kernels' parameters, made from a launch. They are the same on a device and in the tests' emulator.

#pragma once

#include <cstdint>

#include "launch.h"

namespace pacl::cuda {

constexpr float kDeadColumn = -1.0f;  // entry of `columns` for a column whose patch is missing or masked

// The kernel's parameter besides the tensor maps.
struct Work : Arguments, Schedule {};

// Parameters for filling `columns` [tiles][width] with 1 / norm of each patch, or kDeadColumn.
struct Columns {
  const float* inverse_norms;  // [images, patches]
  const uint8_t* mask;         // or null
  int64_t mask_stride_image, mask_stride_row;
  float* columns;
  int64_t images, tiles;
  int patches, width, pitch, images_of_tile, chunks;
};

// A tensor of 16-bit elements for the copy engine, innermost dimension first. `strides` are in bytes; [0] is unused.
struct Box {
  const void* base;
  int64_t sizes[3], strides[3];
  int box[3];
};

inline Box gram_box(const Launch& launch) {
  int64_t n = launch.plan.patches, stride = launch.gram_stride;
  return {.base = launch.gram,
          .sizes = {n, n, launch.plan.images},
          .strides = {2, 2 * stride, 2 * n * stride},
          .box = {kStep, launch.plan.width, 1}};
}

inline Box patch_box(const Launch& launch) {
  const Plan& plan = launch.plan;
  if (reads_attention(launch.epilogue)) return gram_box(launch);
  return {.base = launch.patch_rows,
          .sizes = {plan.dim, plan.patches, plan.images},
          .strides = {2, 2 * launch.patch_stride_row, 2 * launch.patch_stride_image},
          .box = {kStep, plan.pitch, plan.images_of_tile}};
}

inline Box text_box(const Launch& launch) {
  const Plan& plan = launch.plan;
  if (reads_attention(launch.epilogue))
    return {.base = launch.arguments.attention,
            .sizes = {plan.patches, plan.images * plan.texts, 1},
            .strides = {2, 2 * launch.arguments.attention_stride, 0},
            .box = {kStep, kTileTexts, 1}};
  return {.base = launch.text_rows,
          .sizes = {plan.dim, plan.texts, 1},
          .strides = {2, 2 * launch.text_stride, 0},
          .box = {kStep, kTileTexts, 1}};
}

// Returns the box of a bulk tensor store of W, `[images, patches, weights_stride]`.
inline Box weights_box(const Launch& launch) {
  int64_t n = launch.plan.patches, stride = launch.arguments.weights_stride;
  return {.base = launch.arguments.weights,
          .sizes = {launch.plan.texts, n, launch.plan.images},
          .strides = {2, 2 * stride, 2 * n * stride},
          .box = {kTileTexts, launch.plan.box_patches, 1}};
}

// Returns the box of a bulk tensor store of the attention.
inline Box attention_box(const Launch& launch) {
  int64_t texts = launch.plan.texts, stride = launch.arguments.attention_stride;
  return {.base = launch.arguments.attention,
          .sizes = {ceil_div(launch.plan.patches, 8) * 8, texts, launch.plan.images},
          .strides = {2, 2 * stride, 2 * texts * stride},
          .box = {kTileTexts, kTileTexts, 1}};
}

// Returns true if the boxes of patches and texts are float16. The Gram matrix always is.
inline bool boxes_are_half(const Launch& launch) { return launch.half || reads_attention(launch.epilogue); }

// Makes the tensor maps that a launch uses. `map_of(box, dimensions, half)` makes one.
template <class Maps, class MapOf>
Maps maps_of(const Launch& launch, const MapOf& map_of) {
  Maps maps{};
  maps.patches = map_of(patch_box(launch), 3, boxes_are_half(launch));
  maps.texts = map_of(text_box(launch), 2, boxes_are_half(launch));
  if (has_second_product(launch.epilogue)) maps.gram = map_of(gram_box(launch), 3, true);
  if (is_transposed(launch.epilogue)) {
    maps.weights = map_of(weights_box(launch), 3, launch.half);
    if (has_second_product(launch.epilogue)) maps.attention = map_of(attention_box(launch), 3, launch.half);
  }
  return maps;
}

inline Columns columns_of(const Launch& launch, const float* inverse_norms, const uint8_t* mask,
                          int64_t mask_stride_image, int64_t mask_stride_row, float* columns) {
  const Plan& plan = launch.plan;
  return {.inverse_norms = inverse_norms,
          .mask = mask,
          .mask_stride_image = mask_stride_image,
          .mask_stride_row = mask_stride_row,
          .columns = columns,
          .images = plan.images,
          .tiles = plan.groups * plan.chunks,
          .patches = plan.patches,
          .width = plan.width,
          .pitch = plan.pitch,
          .images_of_tile = plan.images_of_tile,
          .chunks = plan.chunks};
}

inline Work make_work(const Launch& launch) {
  Work work{launch.arguments, launch.plan};
  // The largest store to which every block of eight columns is aligned, in any image and text.
  auto aligned = [&](int elements) {
    return work.patches % elements == 0 && work.weights_stride % elements == 0 &&
           reinterpret_cast<uintptr_t>(work.weights) % (2 * elements) == 0;
  };
  work.store_elements = aligned(8) ? 8 : aligned(4) ? 4 : 1;
  return work;
}

}  // namespace pacl::cuda
