// Packed panels, sums and scratch memory, shared by tasks or private to a thread. The plan of a call lays them out.
#pragma once

#include "params.h"

namespace pacl {

// Static, because the linker could take a shared inline function from an object that this machine cannot run.
static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
static inline int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kMeans = 64;                  // most images of a block with means
constexpr int64_t kMeansCapacity = 2 * kMeans;  // a tile may write past the last mean

// A matrix is stored as panels, `[columns / panel][rows][panel]` of 4-byte units. The row of a tile is then contiguous,
// both to broadcast (left operand) and to load (right operand), and every stride is a compile-time constant.

struct Rows {               // valid patches, packed one after the other
  float* units;             // panels of [rows, units of D]: left operand of the scores
  float* row_units;         // panels of [row units, D]: right operand of the texts' gradient; = units for float32
  float* inv_norm;          // [capacity], 0 for a row without a direction and for padding
  float* range_scale;       // [capacity], the power of two that scaled a long row (see rows.h), otherwise 1
  int32_t* image;           // [capacity]
  int32_t* index;           // [capacity], position n in its image, -1 for padding
  int64_t capacity, count;  // rows between panels; rows in use, padding included
  int64_t first_row;        // backward: the row of the call that comes first
  // Images of the block if weights are stored less their means (see Weights), otherwise 0.
  int64_t means;
  const int64_t* image_begin;  // [means + 1], first row of each image, then `count`
  const float* share;          // [means], 1 / (number of valid patches)
};

struct Texts {        // a block of texts
  float* transposed;  // panels of [units of D, texts]: right operand of the scores
  float* row_units;   // panels of [text units, D]: right operand of the patches' gradient, or null
  float* inv_norm;    // [padded], 0 for padding
  int64_t first, count, padded;
};

// W = dS / (|p| |t|) of a block of rows and a block of texts. In bfloat16 at large τ (kMeanTemperature), a mean c of
// each image and text is subtracted first, so that only small numbers are rounded:
//   R = (dS / |t| - c) / |p|,  W T = R T + (c T) / |p|,  W' P = R' P + c' Σ p̂
// This holds for any c, so c is a bfloat16 number and exact. It is stored twice for image i of the block: in a row of
// its own in `units`, which gives c T (Sums.means), and, in both halves, in row count / 2 + i of `row_units`, opposite
// Σ p̂ in Rows.row_units, a sum of two bfloat16 numbers.
struct Weights {
  float* units;      // panels of [rows, text units]: left operand of the patches' gradient
  float* row_units;  // panels of [row units, texts]: left operand of the texts' gradient; = units for float32
};

// W T: the patches' gradient before its projection.
struct Sums {
  float* panels;            // [rows, D] of float32
  int64_t capacity, first;  // rows between panels; the row of the block that comes first
  float* means;             // panels [kMeansCapacity, D]: c T of each image, see Weights
};

// Sums of a task that computes weights. The two errors are squared norms of the error that rounding W to 16 bits causes
// in the gradients before their projection. compatibility_backward compares them with the gradients.
struct WeightSums {
  double temperature = 0;                // -τ² ∂L/∂τ
  double loss = 0, scale = 0, bias = 0;  // of the sigmoid loss in one pass, not yet divided by B
  double patches_error = 0, texts_error = 0;

  void add(const WeightSums& other) {
    temperature += other.temperature;
    loss += other.loss;
    scale += other.scale;
    bias += other.bias;
    patches_error += other.patches_error;
    texts_error += other.texts_error;
  }
};

// Gradients of logit scale and bias from the rows of a task.
struct LossSums {
  double scale = 0, bias = 0;
};

struct Scratch {  // private to a thread; panels are [rows, panel] of float32 unless they are said to hold units
  Rows rows;      // forward: the current rows
  float* row;     // rows of D being read or written
  float* scores;
  float* sums;                      // dot backward, if one block holds all texts: Sums.panels of a chunk
  float *largest, *sum, *weighted;  // forward: running softmax statistics [images, texts]
  // Cosine form only.
  float* attention;
  float* gram;                                                   // G, panels [N, N]
  float *gram_high, *gram_low, *attention_high, *attention_low;  // matrix unit: each split into two bfloat16, in units
  float* gram_attention;                                         // q = G a
  float* transposed;                                             // [units of D, panel]
  float *pooled_patch, *direction;                               // panels [D], in place of q; see cosine_pooled.h
  float *scaled, *scaled_units, *attention_t, *attention_t_units;  // backward
  float *norm_term, *norm_term_units;                              // backward: C, panels [N, N]
};

// Images of a block of the max form's backward: a run of whole ones, or a part of one that is larger than a block.
struct MaxImages {
  int64_t first, last;  // the run
  int64_t patch_first;  // 0, or where the part begins
  int64_t patches;      // of the part, or of the largest image
  int64_t all_patches;  // of the part, or of all images
};

// A block of the max form's backward: some images, and a run of texts.
struct MaxBlock {
  MaxImages images;
  int64_t text_first, text_count;
  const float** patch;  // [patches of the images], rows of D in float32; null where no text has chosen the patch
  float *patch_norm, *patch_range_scale;  // the inverse norm; see Rows for the scale
  float* patch_rows;                      // storage for rows that cannot be read in place
  float* patch_sums;                      // rows of D, or null where one block holds all texts
  const float** text;                     // the same as `patch`, for texts
  float *text_norm, *text_rows;
  int32_t *order, *start;  // texts of each image sorted by chosen patch, and where those of patch n begin
};

struct MaxScratch {     // private to a thread
  const float** rows;   // the terms of a weighted sum
  float* weights;       // their weights, entries of W
  float *sum, *buffer;  // rows of D
};

// A tile of the upsampling, private to a thread: `vectors` vectors of output columns from `first` on, all classes, and
// two rows of scores.
struct UpsampleTile {
  int64_t first, vectors;
  float* rows[2];       // [vectors, C, lanes]: source rows, enlarged horizontally
  int64_t held[2];      // the source row in each slot, -1 for none
  bool nan[2];          // true if the slot holds a NaN
  float* source;        // [kSources, w + 1] and 2 lanes: the part of a source row that the tile reads, for some classes
  int32_t* column;      // [vectors * lanes], relative to that part
  float* fraction;      // [vectors * lanes]
  int32_t *all, *some;  // [C]: all classes, and the candidates for the best one
};

constexpr int64_t kSources = 16;  // classes that are read together

}  // namespace pacl
