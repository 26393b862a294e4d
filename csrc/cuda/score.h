// The fused functions on Hopper: what the binding calls. No CUDA headers, so that it compiles with any compiler.

#pragma once

#include <cstdint>
#include <string>

#include "dtype.h"
#include "plan.h"

namespace pacl::cuda {

// One launch, for images [0, images) and texts [0, texts) of what the addresses point to. Strides in elements.
struct ScoreCall {
  Epilogue epilogue;
  int64_t images, patches_per_image, texts, dim;
  Dtype dtype;                 // bfloat16 or float16, of patches and texts
  const void* patches;         // rows contiguous, everything else a multiple of 16 bytes
  int64_t patch_stride_image, patch_stride_row;
  const void* texts_data;
  int64_t text_stride_row;
  const float* columns;        // [tiles][width], from `score_columns`
  const float* inverse_texts;  // [texts]
  float temperature;
  const float* temperature_at;  // or null; on the device, where it decides which of two launches works
  float* phi;                   // [images, stride_phi]; read by the backward of `dot`, and by `attention` if not null
  float* stat;
  int64_t stride_phi;
  const float* grad_phi;
  void* weights;               // [texts, stride_weights], of `dtype`
  int64_t stride_weights;
  const float* weight_scale;   // or null
  float* temperature_sums;     // or null; one for each block
  bool masked;                 // whether any patch of `columns` may be masked; read by the backward
  const void* gram;             // [images, patches, stride_gram] of float16, for the cosine form
  int64_t stride_gram;
  // [images, texts, attention_pitch]: of `dtype` where `cosine_weights` stores it, otherwise of float16.
  void* attention;
  int64_t attention_pitch;      // a multiple of 8; at most 7 elements behind the patches are written too, as zeros
  float* curvature;             // [images, texts]
  int cluster;                 // 1, 2, or 0 for what is best
  int device;
  void* stream;
};

// All of these launch on `stream` of `device` and throw std::runtime_error with CUDA's own text.
Plan device_plan(const ScoreCall& call);
// `columns` for `score`, from 1 / norm of the call's patches [images, patches], contiguous, and a mask of bool or null.
void make_columns(const ScoreCall& call, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns);
void score(const ScoreCall& call);

}  // namespace pacl::cuda
