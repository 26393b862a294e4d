// A launch on Hopper, and the functions that run it. Without CUDA headers, so that any compiler can read it.

#pragma once

#include <cstdint>

#include "plan.h"

namespace pacl::cuda {

// Arguments of the kernel other than the operands of its products, for images [0, images) and texts [0, texts). Strides
// are in elements.
struct Arguments {
  const float* columns;        // [tiles][width], from make_columns
  const float* inverse_texts;  // [texts]: 1 / norm
  float temperature;
  const float* temperature_at;  // on the device, or null; it decides which of two launches runs
  float* phi;    // [images, phi_stride]; also read by the backward of `dot`, and by `attention` if not null
  float* state;  // [images, phi_stride], in bits: the entropy for `dot`, the log-sum-exp for `cosine`
  int64_t phi_stride;
  const float* grad_phi;  // [images, phi_stride]
  // [texts, weights_stride], of the launch's dtype, or [images, patches, weights_stride] if the epilogue transposes it.
  // Null: no row of weights or attention is stored (not for a transposing epilogue).
  uint16_t* weights;
  bool full;  // for the backward: patches may be masked, or temperature_sums is not null
  int64_t weights_stride;
  int store_elements;        // weights per store: 8, 4 or 1, set by make_work
  const float* range_scale;  // or null; a power of two that multiplies the weights and the norm factors
  float* temperature_sums;   // or null; one sum per block
  // [images, texts, attention_stride]; of the launch's dtype in `cosine_weights`, otherwise float16
  uint16_t* attention;
  int64_t attention_stride;  // a multiple of 8; up to 7 elements past the patches are set to zero
  float* norm_factor;        // [images, texts]
  // For a sigmoid loss. Arrays of pairs are [images, phi_stride]. Without ids and targets, image i and text i +
  // `own_text` belong together.
  float logit_scale, logit_bias;
  const float *logit_scale_at, *logit_bias_at;  // on the device, in place of the numbers, or null
  float share;                                  // of a pair in the loss: 1 / the number of all images
  int64_t own_text;
  const int64_t *image_ids, *text_ids;  // [images] and [texts], or null
  const float* targets;                 // or null
  const float* pair_bias;               // or null
  float* grad_pair_bias;                // or null
  float* loss_sums;                     // [blocks][kLossSums]; the first three without `share`
};

struct Launch {
  Epilogue epilogue;
  bool half;  // patches, texts and weights are float16, otherwise bfloat16
  int device;
  Plan plan;  // includes the sizes
  void* stream;
  // The operands. Rows are contiguous; addresses and strides are multiples of 16 bytes.
  const void* patch_rows;  // [images, patches, dim]
  int64_t patch_stride_image, patch_stride_row;
  const void* text_rows;  // [texts, dim]
  int64_t text_stride;
  const void* gram;  // [images, patches, gram_stride] of float16, for the cosine form
  int64_t gram_stride;
  Arguments arguments;
};

// Defined by launch.cu, and for the host by tests/kernels/cuda/emulated.cpp. They throw std::runtime_error with CUDA's
// error text. make_columns and run use the stream and the device of `launch`.

int processors_of(int device);

// Fills `columns` from the patches' inverse norms, [images, patches], contiguous, and a mask of bool or null.
void make_columns(const Launch& launch, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns);

void run(const Launch& launch);

}  // namespace pacl::cuda
