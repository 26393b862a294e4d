// One launch on Hopper, and the functions that carry it out. No CUDA headers, so that it compiles with any compiler.

#pragma once

#include <cstdint>

#include "plan.h"

namespace pacl::cuda {

// What the kernel reads and writes, beside the operands of its products: for images [0, images) and texts [0, texts) of
// what the addresses point to. Strides are in elements.
struct Arguments {
  const float* columns;        // [tiles][width], from make_columns
  const float* inverse_texts;  // [texts]: 1 / norm
  float temperature;
  const float* temperature_at;  // or null; on the device, where it decides which of two launches works
  float* phi;                   // [images, phi_stride]; read by the backward of `dot`, and by `attention` if not null
  float* state;                 // [images, phi_stride], in bits: `dot` has the entropy, `cosine` the log-sum-exp
  int64_t phi_stride;
  const float* grad_phi;  // [images, phi_stride]
  uint16_t* weights;      // [texts, weights_stride], of the launch's dtype
  bool full;              // patches may be masked, or temperature_sums is not null; read by the backward
  int64_t weights_stride;
  int store_elements;        // of the weights that one store may take: 8, 4 or 1; make_work sets it
  const float* range_scale;  // or null; a power of two that multiplies the weights and the norm factors
  float* temperature_sums;   // or null; one for each block
  // [images, texts, attention_stride]; of the launch's dtype in `cosine_weights`, otherwise float16
  uint16_t* attention;
  int64_t attention_stride;  // a multiple of 8; at most 7 elements behind the patches are written too, as zeros
  float* norm_factor;        // [images, texts]
};

struct Launch {
  Epilogue epilogue;
  bool half;  // patches, texts and weights are of float16, otherwise of bfloat16
  int device;
  Plan plan;  // has the sizes
  void* stream;
  // The operands: rows are contiguous, addresses and strides are multiples of 16 bytes.
  const void* patch_rows;  // [images, patches, dim]
  int64_t patch_stride_image, patch_stride_row;
  const void* text_rows;  // [texts, dim]
  int64_t text_stride;
  const void* gram;  // [images, patches, gram_stride] of float16, for the cosine form
  int64_t gram_stride;
  Arguments arguments;
};

// launch.cu defines these, and tests/cuda/emulated.cpp does for the host. They throw std::runtime_error with CUDA's own
// text; the last two launch on the stream and the device of `launch`.

int processors_of(int device);

// Writes `columns` from 1 / norm of the patches, [images, patches], contiguous, and a mask of bool or null.
void make_columns(const Launch& launch, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns);

void run(const Launch& launch);

}  // namespace pacl::cuda
