// What tasks share and what each thread has of its own: packed panels, sums and scratch memory. The plan of a call lays
// them out.
#pragma once

#include "params.h"

namespace pacl {

// static: a shared inline function could be linked from an object that this machine cannot run.
static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
static inline int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t kMeans = 64;                  // images of a block with means, at most
constexpr int64_t kMeansCapacity = 2 * kMeans;  // a tile may write past them

// A matrix is stored as panels, `[columns / panel][rows][panel]` of 4-byte units: the row of a tile is then contiguous
// whether it is broadcast (left operand) or loaded (right operand), and every stride is a compile-time constant.

struct Rows {               // patches that take part, gathered one after the other; masked ones leave no trace
  float* units;             // panels of [rows, units of D]: left operand of the scores
  float* row_units;         // panels of [row units, D]: right operand of the texts' gradient; = units for float32
  float* inv_norm;          // [capacity], 0 for a row without a direction and for padding
  float* range_scale;       // [capacity], the power of two by which a long row was multiplied
  int32_t* image;           // [capacity]
  int32_t* index;           // [capacity], position n in its image, -1 for padding
  int64_t capacity, count;  // rows between panels; rows in use, padding included
  // Where weights are stored less their means (plan.h), see Weights: for each image of the block the first of its
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
// Image i of the block has it in a row of its own of `units`, from which Sums.means gets c T, and in both halves of row
// `count / 2 + i` of `row_units`, where Rows.row_units holds Σ p̂ as the sum of two numbers of bfloat16.
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
// gradients before their projection; compatibility_backward compares them with the gradients.
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
  float* sums;                      // backward of the dot form, where one block holds all texts: Sums.panels of a chunk
  float *largest, *sum, *weighted;  // forward: running softmax statistics [images, texts]
  // Cosine form only.
  float* attention;
  float* gram;                                                     // G, panels [N, N]
  float *gram_high, *gram_low, *attention_high, *attention_low;    // matrix unit: both as sums of two, in units
  float* gram_attention;                                           // q = G a
  float* transposed;                                               // [units of D, panel]
  float *pooled_patch, *direction;                                 // panels [D], where q will not do: v, see cosine.h
  float *scaled, *scaled_units, *attention_t, *attention_t_units;  // backward
  float *norm_term, *norm_term_units;                              // backward: C, panels [N, N]
};

// The max form's backward: patches [patch_first, patch_first + patches) of a run of images, and a run of texts.
struct MaxBlock {
  int64_t image_first, image_last, patch_first, patches, text_first, text_count;
  const float** patch;  // [images * patches], rows of D in float32; null where no text has chosen the patch
  float *patch_norm, *patch_range_scale;  // inverse; see Rows
  float* patch_rows;                      // where such rows lie that are not the caller's own
  float* patch_sums;                      // rows of D, or null where one block holds all texts
  const float** text;                     // the same for texts
  float *text_norm, *text_rows;
  int32_t *order, *start;  // the texts of each image by the patch they chose, and where those of patch n begin
};

struct MaxScratch {     // one thread's own
  const float** rows;   // what a sum adds up, each times its weight
  float* weights;       // entries of W
  float *sum, *buffer;  // rows of D
};

// Upsampling, one thread's own. A tile is `vectors` vectors of output columns from `first` on, all classes, and two
// rows of scores.
struct UpsampleTile {
  int64_t first, vectors;
  float* rows[2];       // [vectors, C, lanes]: source rows, enlarged horizontally
  int64_t held[2];      // which rows of which image those are, -1 for none
  bool nan[2];          // true where there is a NaN in it
  float* source;        // [kSources, w + 1] and 2 lanes: of some classes the part of a source row that the tile reads
  int32_t* column;      // [vectors * lanes], relative to that part
  float* fraction;      // [vectors * lanes]
  int32_t *all, *some;  // [C]: the classes, and those that may win
};

constexpr int64_t kSources = 16;  // classes that are read together

}  // namespace pacl
