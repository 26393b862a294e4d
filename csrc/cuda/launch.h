// One launch on Hopper, and the functions that carry it out. No CUDA headers, so that it compiles with any compiler.

#pragma once

#include <cstdint>

#include "plan.h"

namespace pacl::cuda {

// What the kernel reads and writes, beside the operands of the products. For images [0, images) and texts [0, texts) of
// what the addresses point to; strides in elements.
struct Arguments {
  const float* columns;         // [tiles][width], from make_columns
  const float* inverse_texts;   // [texts]
  float temperature;
  const float* temperature_at;  // or null; on the device, where it decides which of two launches works
  float* phi;                   // [images, phi_stride]; read by the backward of `dot`, and by `attention` if not null
  float* state;
  int64_t phi_stride;           // also of `state` and `grad_phi`
  const float* grad_phi;
  uint16_t* weights;            // [texts, weights_stride], of the launch's dtype
  bool full;                    // the backward may meet masked patches, or temperature_sums is not null
  int64_t weights_stride;
  int store_elements;           // of the weights that one store may take: 8, 4 or 1; make_work sets it
  const float* range_scale;    // or null
  float* temperature_sums;      // or null; one for each block
  // [images, texts, attention_stride]: of the launch's dtype where `cosine_weights` stores it, otherwise of float16.
  uint16_t* attention;
  int64_t attention_stride;     // a multiple of 8; at most 7 elements behind the patches are written too, as zeros
  float* norm_factor;             // [images, texts]
};

struct Launch {
  Epilogue epilogue;
  bool half;  // patches, texts and weights are of float16, otherwise of bfloat16
  int device;
  Plan plan;
  void* stream;
  // The operands: rows are contiguous, addresses and strides multiples of 16 bytes.
  const void* patch_rows;  // [images, patches, dim]
  int64_t patch_stride_image, patch_stride_row;
  const void* text_rows;  // [texts, dim]
  int64_t text_stride;
  const void* gram;  // [images, patches, gram_stride] of float16, for the cosine form
  int64_t gram_stride;
  Arguments arguments;
};

// In launch.cu; tests/cuda/emulated.cpp has them for the host. Those that launch do it on the launch's stream and device.
// All throw std::runtime_error with CUDA's own text.

int processors_of(int device);
// Writes `columns` of the arguments, from 1 / norm of the patches, [images, patches], contiguous, and a mask of bool or null.
void make_columns(const Launch& launch, const float* inverse_norms, const uint8_t* mask, int64_t mask_stride_image,
                  int64_t mask_stride_row, float* columns);
void run(const Launch& launch);

}  // namespace pacl::cuda
