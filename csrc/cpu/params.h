// Parameters of a call of the CPU kernels, filled by the binding. Strides, and sizes not named as bytes, are in
// elements.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace pacl {

enum class Form { dot, cosine, max };

// Functions of the OpenMP runtime that PyTorch has loaded. Its workers spin for milliseconds after each parallel
// region, and threads of our own would compete with them for the cores. If null, std::thread is used.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*thread_num)();
  int (*num_threads)();
};

// Blocks of the backward, each of which has a piece of the memory of the scores that the forward keeps; see kept.h.
// Rows are valid patches, one after the other.
struct ScoreBlocks {
  int64_t count;
  const int64_t* first_row;    // [count + 1], of each block, then the end
  const int64_t* first_patch;  // [count], the patch of the call that is the block's first row
  const int64_t* image_row;    // [B + 1], the first row of each image, then the end
};

// The compatibility φ of images and texts, and its gradients.
struct CompatibilityParams {
  int64_t images, patches_per_image, text_count, dim;  // B, N, K, D; with patch_starts N is the largest length, or 1
  // [B + 1], or null. Packed patches: image b has rows [patch_starts[b], patch_starts[b + 1]) of patches and
  // grad_patches [ΣN, D] and of mask [ΣN], whose strides by image are not used. See patches.h.
  const int64_t* patch_starts;
  Dtype dtype;  // of patches, texts and the patches' gradient
  Form form;
  bool raw;  // rows of patches and texts are used as they are, as if their norms were 1
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
  // [B + 1] and [ΣM], or null: image b meets only the texts list_texts[list_starts[b]] to list_texts[list_starts[b + 1]
  // - 1], each once. phi, state and grad_phi are then [ΣM].
  const int64_t* list_starts;
  const int32_t* list_texts;
  float* phi;  // [B, K], written by the forward, read by the backward
  // [B, K], for the backward. Dot form: log Σ exp(s / τ) over the patches for τ >= 0.05, otherwise
  // log Σ exp((s - phi) / τ), the entropy of the attention: it is small, hence so is its rounding error. Max form: the
  // winner's index n, or -1 without a patch.
  float* state;
  // Memory in which the forward keeps scores for the backward, which then does not compute them again; null: none. See
  // kept.h. It may be the memory of grad_patches.
  char* scores;
  int64_t scores_row_bytes;  // bytes for each row of the call
  // A forward of some texts of the backward's call: the number of all texts (0: these are all), and the first of these,
  // a multiple of the panels' width. All such forwards must run the kernels of the backward.
  int64_t scores_texts, scores_first_text;
  const ScoreBlocks* score_blocks;  // null if none are kept; set by the functions of calls.h
  // Backward only; a null gradient is not computed.
  const float* grad_phi;    // [B, K]
  void* grad_patches;       // [B, N, D], contiguous
  bool fresh_gradient;      // grad_patches is in memory never written to; set by compatibility_backward
  void* grad_texts;         // [K, D], contiguous
  Dtype grad_texts_dtype;   // that of the texts, or float32 where the caller adds to the sums
  float* texts_sum;         // [accumulator_floats], required with grad_texts
  bool leaves_texts_sum;    // the gradient stays there, before its projection; set by lists.h
  float* grad_temperature;  // [1]
  // Sigmoid loss in one pass (sigmoid_step): ∂L/∂φ of a pair follows from its own φ, so phi, state and grad_phi are
  // neither read nor written, and there is no array of all pairs but those that the caller has. See sigmoid.h.
  double* loss_sums;  // [3], B times the loss and the gradients of logit scale and bias; null in the other calls
  float logit_scale, logit_bias;
  const int64_t *image_ids, *text_ids;  // [B], [K]; null: text k belongs to image k
  const float *targets, *pair_bias;     // [B, K], or null
  float* grad_pair_bias;                // [B, K], or null
};

// Bilinear resizing of class scores, fused with the choice of the best class of each pixel. The resized scores are
// never stored.
struct UpsampleParams {
  int64_t images, classes, height, width, out_height, out_width;  // B, C, h, w, H, W
  Dtype dtype;
  int threads;
  OpenMp openmp;
  const void* scores;  // [B, C, h, w]
  struct {
    int64_t image, class_, row, column;
  } strides;
  // Output row y interpolates between input rows row[y] and row[y] + 1, with weight row_fraction[y] for the second.
  // The last input row stands in for the one after it. Columns likewise. Both indices ascend.
  const int32_t *row, *column;                  // [H], [W]
  const float *row_fraction, *column_fraction;  // [H], [W]
  float scale;                                  // factor on the scores in the entropy's softmax
  int16_t* labels;                              // [B, H, W]
  float *best, *entropy;                        // [B, H, W], or null
};

// A loss over the logits `scale φ + bias` of B images and B texts, of which image i belongs to text i, and its
// gradients.
struct LossParams {
  int64_t size;  // B
  bool sigmoid;  // the sigmoid loss; otherwise InfoNCE
  float scale, bias;
  int threads;
  OpenMp openmp;
  const float* phi;  // [B, B]
  // InfoNCE: [4, B], of the rows, then of the columns the largest logit and 1 / Σ exp(logit - largest). The rounding of
  // a log-sum would put an error that grows with log B into every gradient.
  float* statistics;
  float* value;  // [1]
  // Backward only; a null sum is not written.
  float grad_loss;
  float* grad_phi;                // [B, B]
  float *grad_scale, *grad_bias;  // [1]
};

}  // namespace pacl
