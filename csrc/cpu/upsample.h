// Bilinear enlargement (or reduction) of class scores and the best class of each pixel, in one step: the enlarged
// scores never exist. All sizes are in elements unless they say bytes; strides are in elements.
#pragma once

#include "score.h"

namespace pacl {

struct UpsampleParams {
  int64_t images, classes, height, width, out_height, out_width;  // B, C, h, w, H, W
  Dtype dtype;
  int threads;
  OpenMp openmp;
  const void* scores;  // [B, C, h, w]
  int64_t stride_image, stride_class, stride_row, stride_column;
  // Output row y lies between row[y] and the one after that (the last one has none and stands for it), row_weight[y] of
  // the way; columns likewise. Both indices ascend.
  const int32_t *row, *column;              // [H], [W]
  const float *row_weight, *column_weight;  // [H], [W]
  float scale;                              // of the entropy's softmax
  int16_t* labels;                          // [B, H, W]
  float *best, *entropy;                    // [B, H, W], or null
  char* workspace;
  int64_t workspace_bytes;
};

// One thread's own. A tile is `vectors` vectors of output columns from `first` on, all classes, and two rows of scores.
struct UpsampleTile {
  int64_t first, vectors;
  float* rows[2];       // [vectors, C, lanes]: source rows, enlarged horizontally
  int64_t held[2];      // which rows of which image those are, -1 for none
  bool nan[2];          // whether there is a NaN in it
  float* source;        // [kSources, w + 1] and 2 lanes: of some classes the part of a source row that the tile reads
  int32_t* column;      // [vectors * lanes], relative to that part
  float* weight;        // [vectors * lanes]
  int32_t *all, *some;  // [C]: the classes, and those that may win
};

constexpr int64_t kSources = 16;  // classes that are read together

void upsample_argmax(const UpsampleParams&);
int64_t workspace_bytes(const UpsampleParams&);

}  // namespace pacl
