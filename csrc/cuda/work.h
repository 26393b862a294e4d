// What the kernels are given, made from a call and its plan: the same on a device and in the emulator of the tests.

#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "score.h"

namespace pacl::cuda {

constexpr float kDeadColumn = -1.0f;  // in `columns`, where a patch has 1 / its norm: none there, or masked

// What a launch needs beside the two tensor maps; see ScoreCall and Plan for the names that they share.
struct Work {
  const float* columns;
  const float* inverse_texts;
  float temperature;
  const float* temperature_at;
  float* phi;
  float* stat;
  int64_t stride_phi;
  const float* grad_phi;
  uint16_t* weights;
  bool full;  // whether the backward may meet masked patches, or the temperature's sums are wanted
  int64_t stride_weights;
  int store_elements;  // of the weights that one store may take: 8, 4 or 1
  const float* weight_scale;
  float* temperature_sums;
  uint16_t* attention;
  int64_t attention_pitch;
  float* curvature;
  int64_t images, texts, groups, splits, text_groups, items, clusters;
  int patches, pitch, images_of_tile, chunks, passes, steps, gram_steps, stages, cluster;
  bool resident;
};

// `columns` [tiles][width] of images [image0, image0 + images): 1 / norm of each patch, or kDeadColumn.
struct Columns {
  const float* inverse_norms;  // [images, patches], of those images
  const uint8_t* mask;         // or null; from image0 on
  int64_t mask_stride_image, mask_stride_row;
  float* columns;
  int64_t images, tiles;
  int patches, width, pitch, images_of_tile, chunks;
};

// A tensor of 16-bit elements as the copy engine sees it, innermost dimension first; `strides` in bytes, [0] unused.
struct Box {
  const void* base;
  int64_t sizes[3], strides[3];
  int box[3];
};

inline Box gram_box(const ScoreCall& call, const Plan& plan) {
  int64_t n = call.patches_per_image;
  return {call.gram, {n, n, call.images}, {2, 2 * call.stride_gram, 2 * n * call.stride_gram}, {kStep, plan.width, 1}};
}

inline Box patch_box(const ScoreCall& call, const Plan& plan) {
  if (reads_attention(call.epilogue)) return gram_box(call, plan);
  return {call.patches,
          {call.dim, call.patches_per_image, call.images},
          {2, 2 * call.patch_stride_row, 2 * call.patch_stride_image},
          {kStep, plan.pitch, plan.images}};
}

inline Box text_box(const ScoreCall& call) {
  if (reads_attention(call.epilogue))
    return {call.attention,
            {call.patches_per_image, call.images * call.texts, 1},
            {2, 2 * call.attention_pitch, 0},
            {kStep, kTileTexts, 1}};
  return {call.texts_data, {call.dim, call.texts, 1}, {2, 2 * call.text_stride_row, 0}, {kStep, kTileTexts, 1}};
}

// Whether those boxes are of float16 whatever the call's dtype.
inline bool boxes_are_half(const ScoreCall& call) {
  return call.dtype == Dtype::float16 || reads_attention(call.epilogue);
}

inline Plan plan_of(const ScoreCall& call, int processors) {
  return make_plan(
      call.images, call.patches_per_image, call.texts, call.dim, call.epilogue, processors, call.cluster);
}

inline Columns make_columns(
    const ScoreCall& call, const Plan& plan, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
    int64_t mask_stride_row, float* columns) {
  Columns made{};
  made.inverse_norms = inverse_norms;
  made.mask = mask, made.mask_stride_image = mask_stride_image, made.mask_stride_row = mask_stride_row;
  made.columns = columns;
  made.images = call.images, made.tiles = plan.groups * plan.chunks;
  made.patches = static_cast<int>(call.patches_per_image);
  made.width = plan.width, made.pitch = plan.pitch, made.images_of_tile = plan.images, made.chunks = plan.chunks;
  return made;
}

inline Work make_work(const ScoreCall& call, const Plan& plan) {
  Work work{};
  work.columns = call.columns;
  work.inverse_texts = call.inverse_texts;
  work.temperature = call.temperature;
  work.temperature_at = call.temperature_at;
  work.phi = call.phi;
  work.stat = call.stat;
  work.stride_phi = call.stride_phi;
  work.grad_phi = call.grad_phi;
  work.weights = static_cast<uint16_t*>(call.weights);
  work.full = call.masked || call.temperature_sums;
  work.stride_weights = call.stride_weights;
  // As many neighbours as every block of eight columns is aligned to, whatever image and text it belongs to.
  auto aligned = [&](int elements) {
    return call.patches_per_image % elements == 0 && call.stride_weights % elements == 0 &&
           reinterpret_cast<uintptr_t>(call.weights) % (2 * elements) == 0;
  };
  work.store_elements = aligned(8) ? 8 : aligned(4) ? 4 : 1;
  work.weight_scale = call.weight_scale;
  work.temperature_sums = call.temperature_sums;
  work.attention = static_cast<uint16_t*>(call.attention);
  work.attention_pitch = call.attention_pitch;
  work.curvature = call.curvature;
  work.images = call.images;
  work.texts = call.texts;
  work.groups = plan.groups;
  work.splits = plan.splits;
  work.text_groups = plan.text_groups;
  work.items = plan.items;
  work.clusters = plan.clusters;
  work.patches = static_cast<int>(call.patches_per_image);
  work.pitch = plan.pitch;
  work.images_of_tile = plan.images;
  work.chunks = plan.chunks;
  work.passes = plan.passes;
  work.steps = plan.steps;
  work.gram_steps = plan.gram_steps;
  work.stages = plan.stages;
  work.cluster = plan.cluster;
  work.resident = plan.resident;
  return work;
}

}  // namespace pacl::cuda
