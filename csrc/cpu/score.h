// The two fused functions on a CPU: what is asked (ScoreParams), the plan of tiles and memory, and the table of kernels
// that each instruction set fills. All sizes are in elements unless they say bytes; strides are in elements.
#pragma once

#include <cstdint>

namespace pacl {

enum class Dtype { float32, bfloat16, float16 };
enum class Form { dot, cosine, max };

// The OpenMP runtime that the process has anyway (PyTorch's), by address. After each parallel region its workers spin
// for milliseconds, and threads of our own would share the cores with them. Null: std::thread.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*thread_num)();
  int (*num_threads)();
};

struct ScoreParams {
  int64_t images, patches_per_image, texts_count, dim;  // B, N, K, D
  Dtype dtype;                                          // of patches, texts and the patches' gradient
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
  float* lse;
  // Backward only; a null gradient is not computed.
  const float* grad_phi;    // [B, K]
  void* grad_patches;       // [B, N, D], contiguous
  bool fresh_gradient;      // nobody has written to its memory yet; score_backward finds out
  void* grad_texts;         // [K, D], contiguous
  Dtype grad_texts_dtype;   // that of the texts, or float32 for sums that go on
  float* texts_sum;         // [accumulator_floats], needed with grad_texts
  float* grad_temperature;  // [1]
  char* workspace;
  int64_t workspace_bytes;
};

// A matrix is stored as panels, `[columns / panel][rows][panel]` of 4-byte units: the row of a tile is then contiguous
// whether it is broadcast (left operand) or loaded (right operand), and every stride is a compile-time constant.

struct Rows {               // patches that take part, gathered one after the other; masked ones leave no trace
  float* units;             // panels of [rows, units of D]: left operand of the scores
  float* row_units;         // panels of [row units, D]: right operand of the texts' gradient; = units for float32
  float* inv_norm;          // [capacity], 0 for a row without a direction and for padding
  float* scale;             // [capacity], the power of two by which a long row was multiplied
  int32_t* image;           // [capacity]
  int32_t* index;           // [capacity], position n in its image, -1 for padding
  int64_t capacity, count;  // rows between panels; rows in use, padding included
  // Where weights are stored less their means (score.cpp), see Weights: for each image of the block the first of its
  // rows (and behind the last image `count`), and 1 / (number of its valid patches).
  int64_t means;
  const int64_t* image_begin;  // [means + 1]
  const float* share;          // [means]
};

struct Texts {        // a block of texts
  float* transposed;  // panels of [units of D, texts]: right operand of the scores
  float* row_units;   // panels of [text units, D]: right operand of the patches' gradient, or null
  float* inv_norm;    // [padded], 0 for padding
  int64_t first, count, padded;
};

// W = dS / (|p| |t|) of a block of rows and a block of texts. In bfloat16 it may be less a mean of its image and text:
//   W = (dS / |t| - c) / |p|,  W T = that + (c T) / |p|,  W' P = that + c' Σ p̂
// for any c; near the mean it leaves small numbers to be rounded. c itself is a number of bfloat16 and thus exact.
// Image i of the block has it in a row of its own of `units`, from which Sums.means gets c T, and in both halves of row `count / 2 + i` of `row_units`, where Rows.row_units holds Σ p̂ as the sum of two numbers of bfloat16.
struct Weights {
  float* units;      // panels of [rows, text units]: left operand of the patches' gradient
  float* row_units;  // panels of [row units, texts]: left operand of the texts' gradient; = units for float32
};

// W T: the patches' gradient before its projection.
struct Sums {
  float* panels;            // [rows, D] of float32
  int64_t capacity, first;  // rows between panels; the row of the block that leads them
  float* means;             // panels [kMeansCapacity, D]: c T of each image, see Weights
};

// Sums of a task that makes weights. The two errors are squared norms of what the rounding of W to 16 bits adds to the
// gradients before their projection; score_backward compares them with the gradients.
struct WeightSums {
  double temperature = 0;  // -τ² ∂L/∂τ
  double patches_error = 0, texts_error = 0;

  void add(const WeightSums& other) {
    temperature += other.temperature;
    patches_error += other.patches_error;
    texts_error += other.texts_error;
  }
};

struct Scratch {  // one thread's own; panels are [rows, panel] of float32 unless they say units
  Rows rows;      // forward: the rows at hand
  float* row;     // rows of D as they are read or written
  float* scores;
  float* sums;  // backward of the dot form, where one block holds all texts: Sums.panels of a chunk
  float *largest, *sum, *weighted;  // forward: running softmax statistics [images, texts]
  // Cosine form only.
  float* attention;
  float* gram;                                                     // panels [N, N]
  float *gram_high, *gram_low, *attention_high, *attention_low;    // matrix unit: both as sums of two, in units
  float* pooled;                                                   // G a
  float* transposed;                                               // [units of D, panel]
  float *pool, *direction;                                         // panels [D], where G a will not do
  float *scaled, *scaled_units, *attention_t, *attention_t_units;  // backward
  float *outer, *outer_units;                                      // backward: panels [N, N]
};

// The max form's backward: patches [patch_first, patch_first + patches) of a run of images, and a run of texts.
struct MaxBlock {
  int64_t image_first, image_last, patch_first, patches, text_first, text_count;
  const float** patch;  // [images * patches], rows of D in float32; null where no text has chosen the patch
  float *patch_norm, *patch_scale;  // inverse; see Rows
  float* patch_rows;    // where such rows lie that are not the caller's own
  float* patch_sums;    // rows of D, or null where one block holds all texts
  const float** text;   // the same for texts
  float *text_norm, *text_rows;
  int32_t *order, *start;  // the texts of each image by the patch they chose, and where those of patch n begin
};

struct MaxScratch {    // one thread's own
  const float** rows;  // what a sum adds up
  float* weights;
  float *sum, *buffer;  // rows of D
};

struct UpsampleParams;  // upsample.h
struct UpsampleTile;

struct Kernels {
  int panel, tile_rows, tile_columns, pair, inner;
  bool matrix;
  // Gathers rows [first, last) of the call's valid patches (row_start: their prefix count by image) into `to` at `at`.
  void (*pack_rows)(const ScoreParams&, const int64_t* row_start, int64_t first, int64_t last, Rows& to, int64_t at,
                    float* row);
  // Packs panel `panel` of the block.
  void (*pack_texts)(const ScoreParams&, Texts& to, int64_t panel, float* row);
  // phi and lse of images [first, last) and panels [panel_first, panel_last) of the block; image `next` is likely to
  // be this thread's next.
  void (*forward)(const ScoreParams&, const int64_t* row_start, int64_t first, int64_t last, const Texts&,
                  int64_t panel_first, int64_t panel_last, int64_t next, Scratch&);
  // Weights of rows [first, last) and panels [panel_first, panel_last). For the cosine form the rows are those of one
  // image, and the part of its gradient that the pooled norm adds goes to the sums.
  WeightSums (*weights)(const ScoreParams&, const Rows&, int64_t first, int64_t last, const Texts&, int64_t panel_first,
                    int64_t panel_last, Weights&, const Sums&, bool add, Scratch&);
  // Sums (+)= W texts for rows [first, last); as many rows of the call from `next` on will be
  // packed soon (-1: none).
  void (*patches_product)(const ScoreParams&, const int64_t* row_start, int64_t next, const Rows&, int64_t first,
                          int64_t last, const Texts&, const Weights&, const Sums&, bool add);
  // With means: Σ p̂ of image `i` of the block, and (panel `panel` of D) what c T adds to all its patches.
  void (*sum_rows)(const ScoreParams&, Rows&, int64_t i);
  void (*means_product)(const Rows&, const Texts&, const Weights&, const Sums&, int64_t panel, bool add);
  // texts_sum (panels [padded K, D]) += W' patches for tile columns [first, last) of the block and panels of D.
  void (*texts_product)(const ScoreParams&, const Rows&, const Texts&, const Weights&, int64_t first, int64_t last,
                        int64_t panel_first, int64_t panel_last);
  // Gradient through the norm, from the sums to the caller's buffers; returns its squared norm.
  double (*finish_patches)(const ScoreParams&, const Rows&, int64_t first, int64_t last, const Sums&, float* buffer);
  double (*finish_texts)(const ScoreParams&, int64_t first, int64_t last, float* buffer);
  double (*multiply_adds)(int64_t repeats);  // runs independent multiply-adds, returns their flop
  // The max form's backward, see max.h.
  void (*max_pack_texts)(const ScoreParams&, MaxBlock&, int64_t first, int64_t last);
  void (*max_sort)(const ScoreParams&, MaxBlock&, int64_t image);
  void (*max_patches)(const ScoreParams&, MaxBlock&, int64_t image, int64_t first, int64_t last, MaxScratch&);
  void (*max_texts)(const ScoreParams&, const MaxBlock&, int64_t first, int64_t last, MaxScratch&);
  void (*max_finish_texts)(const ScoreParams&, int64_t first, int64_t last, MaxScratch&);
  // Labels (best scores, entropies) of rows [y, y_last) of an image and the columns of the tile, see argmax.h.
  void (*upsample_argmax)(const UpsampleParams&, int64_t image, int64_t y, int64_t y_last, UpsampleTile&);
};

// static: a shared inline function could be linked from an object that this machine cannot run.
constexpr int64_t kMeans = 64;                 // images of a block with means, at most
constexpr int64_t kMeansCapacity = 2 * kMeans;  // a tile may write past them

static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
static inline int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// By PACL_CPU_ISA or what the machine has; those of float32 take every dtype.
const Kernels& select_kernels(Dtype dtype, int64_t dim);
void score_forward(const ScoreParams&);
void score_backward(const ScoreParams&);
int64_t workspace_bytes(const ScoreParams&, bool backward);
int64_t accumulator_floats(const ScoreParams&);
double multiply_add_rate(Dtype dtype, int threads, double seconds);

}  // namespace pacl
