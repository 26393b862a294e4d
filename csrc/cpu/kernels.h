// The table of kernels that each instruction set fills (kernels.cpp).
#pragma once

#include "panels.h"

namespace pacl {

struct Kernels {
  int panel, tile_rows, tile_columns, pair, inner;
  bool matrix;
  // Packs rows [first, last) of the call's valid patches into `to` at `at`. row_start is their prefix count by image.
  void (*pack_rows)(const CompatibilityParams&, const int64_t* row_start, int64_t first, int64_t last, Rows& to,
                    int64_t at, float* row);
  // Packs panel `panel` of the block.
  void (*pack_texts)(const CompatibilityParams&, Texts& to, int64_t panel, float* row);
  // Computes phi and state for images [first, last) and panels [panel_first, panel_last) of the block, and prefetches
  // image `next`.
  void (*forward)(const CompatibilityParams&, const int64_t* row_start, int64_t first, int64_t last, const Texts&,
                  int64_t panel_first, int64_t panel_last, int64_t next, Scratch&);
  // Computes the weights of rows [first, last) and panels [panel_first, panel_last). In the cosine form the rows are
  // those of one image, and the norm term's part of its gradient goes to the sums.
  WeightSums (*weights)(const CompatibilityParams&, const Rows&, int64_t first, int64_t last, const Texts&,
                        int64_t panel_first, int64_t panel_last, Weights&, const Sums&, bool add, Scratch&);
  // Adds the sigmoid loss of an image without a valid patch, see sigmoid.h.
  void (*add_empty_image)(const CompatibilityParams&, int64_t image, WeightSums&);
  // Sums (+)= W texts for rows [first, last). Prefetches as many rows of the call from `next` on (-1: none), which are
  // packed soon.
  void (*patches_product)(const CompatibilityParams&, const int64_t* row_start, int64_t next, const Rows&,
                          int64_t first, int64_t last, const Texts&, const Weights&, const Sums&, bool add);
  // With means: sum_rows computes Σ p̂ of image `i` of the block, means_product computes c T for panel `panel` of D.
  void (*sum_rows)(const CompatibilityParams&, Rows&, int64_t i);
  void (*means_product)(const Rows&, const Texts&, const Weights&, const Sums&, int64_t panel, bool add);
  // texts_sum (panels [padded K, D]) += W' patches for tile columns [first, last) of the block and panels of D.
  void (*texts_product)(const CompatibilityParams&, const Rows&, const Texts&, const Weights&, int64_t first,
                        int64_t last, int64_t panel_first, int64_t panel_last);
  // Projects the sums through the norm, writes the gradient to the caller's buffers, and returns its squared norm.
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
  // A loss over logits, see loss.h. loss_rows writes the statistics of rows [first, last), and for the columns what
  // loss_columns merges for all blocks of rows; of the sigmoid loss it returns the sum. loss_value averages InfoNCE.
  double (*loss_rows)(const LossParams&, int64_t first, int64_t last, float* columns, int64_t columns_padded);
  void (*loss_columns)(const LossParams&, int64_t first, int64_t last, const float* columns, int64_t columns_padded,
                       int64_t blocks);
  void (*loss_value)(const LossParams&);
  LossSums (*loss_gradient)(const LossParams&, int64_t first, int64_t last);
  // Computes labels (best scores, entropies) of rows [y, y_last) of an image for the tile's columns, see upsample.h.
  void (*upsample_argmax)(const UpsampleParams&, int64_t image, int64_t y, int64_t y_last, UpsampleTile&);
};

// Returns the kernels of select_isa() for a dtype and D. Those of float32 take every dtype.
const Kernels& select_kernels(Dtype dtype, int64_t dim);

}  // namespace pacl
