// The boundary of the CPU kernels: what the binding fills, and the functions that it calls. All sizes are in elements
// unless they say bytes; strides are in elements.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace pacl {

enum class Form { dot, cosine, max };

// The OpenMP runtime that the process has anyway (PyTorch's), by address. After each parallel region its workers spin
// for milliseconds, and threads of our own would share the cores with them. Null: std::thread.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*thread_num)();
  int (*num_threads)();
};

struct CompatibilityParams {
  int64_t images, patches_per_image, text_count, dim;  // B, N, K, D
  Dtype dtype;                                         // of patches, texts and the patches' gradient
  Form form;
  float temperature;
  int threads;
  OpenMp openmp;
  const void* patches;  // [B, N, D]
  int64_t patch_stride_image, patch_stride_row, patch_stride_dim;
  const void* texts;  // [K, D]
  int64_t text_stride_row, text_stride_dim;
  const uint8_t* mask;  // [B, N] of bool, or null
  int64_t mask_stride_image, mask_stride_row;
  float* phi;  // [B, K], written by forward, read by backward
  // [B, K], for the dot form's backward: over patches, log Σ exp(s / τ) for τ of 0.05 and more, and below
  // log Σ exp((s - phi) / τ), the entropy of the attention: it is small, hence its rounding error as well.
  // Max form: the winner's index n, -1 without a patch.
  float* state;
  // Backward only; a null gradient is not computed.
  const float* grad_phi;    // [B, K]
  void* grad_patches;       // [B, N, D], contiguous
  bool fresh_gradient;      // nobody has written to its memory yet; compatibility_backward finds out
  void* grad_texts;         // [K, D], contiguous
  Dtype grad_texts_dtype;   // that of the texts, or float32 for sums that go on
  float* texts_sum;         // [accumulator_floats], needed with grad_texts
  float* grad_temperature;  // [1]
  char* workspace;
  int64_t workspace_bytes;
};

struct UpsampleParams {
  int64_t images, classes, height, width, out_height, out_width;  // B, C, h, w, H, W
  Dtype dtype;
  int threads;
  OpenMp openmp;
  const void* scores;  // [B, C, h, w]
  int64_t stride_image, stride_class, stride_row, stride_column;
  // Output row y lies between row[y] and the one after that (the last one has none and stands for it), row_fraction[y]
  // of the way; columns likewise. Both indices ascend.
  const int32_t *row, *column;                  // [H], [W]
  const float *row_fraction, *column_fraction;  // [H], [W]
  float scale;                                  // of the entropy's softmax
  int16_t* labels;                              // [B, H, W]
  float *best, *entropy;                        // [B, H, W], or null
  char* workspace;
  int64_t workspace_bytes;
};

void compatibility_forward(const CompatibilityParams&);
void compatibility_backward(const CompatibilityParams&);
int64_t workspace_bytes(const CompatibilityParams&, bool backward);
int64_t accumulator_floats(const CompatibilityParams&);
void upsample_argmax(const UpsampleParams&);
int64_t workspace_bytes(const UpsampleParams&);
double fma_peak(Dtype dtype, int threads, double seconds);

}  // namespace pacl
