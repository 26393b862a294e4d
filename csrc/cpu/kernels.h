// The table of kernels that each instruction set fills (kernels.cpp).
#pragma once

#include "panels.h"

namespace pacl {

struct Kernels {
  int panel, tile_rows, tile_columns, pair, inner;
  bool matrix;
  // Gathers rows [first, last) of the call's valid patches (row_start: their prefix count by image) into `to` at `at`.
  void (*pack_rows)(const CompatibilityParams&, const int64_t* row_start, int64_t first, int64_t last, Rows& to,
                    int64_t at, float* row);
  // Packs panel `panel` of the block.
  void (*pack_texts)(const CompatibilityParams&, Texts& to, int64_t panel, float* row);
  // phi and state of images [first, last) and panels [panel_first, panel_last) of the block; image `next` is likely to
  // be this thread's next.
  void (*forward)(const CompatibilityParams&, const int64_t* row_start, int64_t first, int64_t last, const Texts&,
                  int64_t panel_first, int64_t panel_last, int64_t next, Scratch&);
  // Weights of rows [first, last) and panels [panel_first, panel_last). For the cosine form the rows are those of one
  // image, and the norm term's part of its gradient goes to the sums.
  WeightSums (*weights)(const CompatibilityParams&, const Rows&, int64_t first, int64_t last, const Texts&,
                        int64_t panel_first, int64_t panel_last, Weights&, const Sums&, bool add, Scratch&);
  // Sums (+)= W texts for rows [first, last); as many rows of the call from `next` on will be
  // packed soon (-1: none).
  void (*patches_product)(const CompatibilityParams&, const int64_t* row_start, int64_t next, const Rows&,
                          int64_t first, int64_t last, const Texts&, const Weights&, const Sums&, bool add);
  // With means: Σ p̂ of image `i` of the block, and (panel `panel` of D) what c T adds to all its patches.
  void (*sum_rows)(const CompatibilityParams&, Rows&, int64_t i);
  void (*means_product)(const Rows&, const Texts&, const Weights&, const Sums&, int64_t panel, bool add);
  // texts_sum (panels [padded K, D]) += W' patches for tile columns [first, last) of the block and panels of D.
  void (*texts_product)(const CompatibilityParams&, const Rows&, const Texts&, const Weights&, int64_t first,
                        int64_t last, int64_t panel_first, int64_t panel_last);
  // Gradient through the norm, from the sums to the caller's buffers; returns its squared norm.
  double (*finish_patches)(const CompatibilityParams&, const Rows&, int64_t first, int64_t last, const Sums&,
                           float* buffer);
  double (*finish_texts)(const CompatibilityParams&, int64_t first, int64_t last, float* buffer);
  double (*independent_fmas)(int64_t repeats);  // runs independent FMAs, returns their flop
  // The max form's backward, see max.h.
  void (*max_pack_texts)(const CompatibilityParams&, MaxBlock&, int64_t first, int64_t last);
  void (*max_sort)(const CompatibilityParams&, MaxBlock&, int64_t image);
  void (*max_patches)(const CompatibilityParams&, MaxBlock&, int64_t image, int64_t first, int64_t last, MaxScratch&);
  void (*max_texts)(const CompatibilityParams&, const MaxBlock&, int64_t first, int64_t last, MaxScratch&);
  void (*max_finish_texts)(const CompatibilityParams&, int64_t first, int64_t last, MaxScratch&);
  // Labels (best scores, entropies) of rows [y, y_last) of an image and the columns of the tile, see upsample.h.
  void (*upsample_argmax)(const UpsampleParams&, int64_t image, int64_t y, int64_t y_last, UpsampleTile&);
};

// By PACL_CPU_ISA or what the machine has; those of float32 take every dtype.
const Kernels& select_kernels(Dtype dtype, int64_t dim);

}  // namespace pacl
