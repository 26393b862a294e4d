// What a call of the CPU kernels is about, as the binding fills it. All sizes are in elements unless they say bytes;
// strides are in elements.
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

// Compatibility φ of images and texts, and its gradients.
struct CompatibilityParams {
  int64_t images, patches_per_image, text_count, dim;  // B, N, K, D
  Dtype dtype;                                         // of patches, texts and the patches' gradient
  Form form;
  float temperature;
  int threads;
  OpenMp openmp;
  const void* patches;  // [B, N, D]
  struct {
    int64_t image, row, dim;
  } patch_strides;
  const void* texts;  // [K, D]
  struct {
    int64_t row, dim;
  } text_strides;
  const uint8_t* mask;  // [B, N] of bool, or null
  struct {
    int64_t image, row;
  } mask_strides;
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
};

// Bilinear enlargement (or reduction) of class scores and the best class of each pixel, in one step: the enlarged
// scores never exist.
struct UpsampleParams {
  int64_t images, classes, height, width, out_height, out_width;  // B, C, h, w, H, W
  Dtype dtype;
  int threads;
  OpenMp openmp;
  const void* scores;  // [B, C, h, w]
  struct {
    int64_t image, class_, row, column;
  } strides;
  // Output row y lies between row[y] and the one after that (the last one has none and stands for it), row_fraction[y]
  // of the way; columns likewise. Both indices ascend.
  const int32_t *row, *column;                  // [H], [W]
  const float *row_fraction, *column_fraction;  // [H], [W]
  float scale;                                  // of the entropy's softmax
  int16_t* labels;                              // [B, H, W]
  float *best, *entropy;                        // [B, H, W], or null
};

}  // namespace pacl
