// The plan of a call: which rows and texts are in memory together, the size of a task, and the layout of the workspace.
// Include only in files compiled once.
#pragma once

#include <vector>

#include "cosine_cost.h"
#include "kernels.h"
#include "pages.h"

namespace pacl {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kBudget = 60 * kMiB;       // workspace of a call, for any shape and threads, apart from [N, N]
constexpr int64_t kTextsBudget = 10 * kMiB;  // packed texts
constexpr int64_t kRowsBudget = 26 * kMiB;   // a block of rows of the backward: patches, their gradient and weights
constexpr int64_t kTextRange = 256;          // texts of a task

// At this τ and above, the attention is nearly uniform, and bfloat16 weights are stored less their mean (see Weights).
// At small τ the mean is far from most weights; its rounding error would reach patches that no text attends to.
constexpr float kMeanTemperature = 0.5f;

// Allocates aligned pieces of the workspace. Without a base it only counts their bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T = float>
  T* take(int64_t count) {
    T* piece = base ? (T*)(base + used) : nullptr;
    used += round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

inline Arena open_workspace(char* workspace, int64_t bytes) {
  advise_huge_pages(workspace, bytes);
  return {(char*)round_up((int64_t)workspace, 64)};
}

// Assigns rows to the valid patches, image after image. Image b has rows [row_start[b], row_start[b + 1]).
inline std::vector<int64_t> count_rows(const CompatibilityParams& p, int64_t align) {
  std::vector<int64_t> row_start(p.images + 1, 0);
  for (int64_t b = 0; b < p.images; ++b) {
    int64_t count = patches_of(p, b);
    if (const uint8_t* mask = image_mask(p, b)) {
      const int64_t patches = count;
      count = 0;
      for (int64_t n = 0; n < patches; ++n) count += mask[n * p.mask_strides.row] != 0;
    }
    row_start[b + 1] = row_start[b] + round_up(count, align);
  }
  return row_start;
}

// Returns the kernels of a call: those of float32 for rows of any norm, as the rounding of their weights is compared
// with gradients of unit rows. In the cosine form with many patches and few texts, pooled patches in float32 are
// cheaper than a Gram matrix in bfloat16. The matrix unit multiplies about 8 times as fast as float32, and computes
// q = G a from three bfloat16 products.
const Kernels& kernels_of(const CompatibilityParams& p) {
  if (p.raw) return select_kernels(Dtype::float32, p.dim);
  const Kernels& own = select_kernels(p.dtype, p.dim);
  if (p.form != Form::cosine || own.pair == 1) return own;
  double pooled = 0, gram = 0;
  const std::vector<int64_t> row_start = count_rows(p, 1);
  for (int64_t b = 0; b < p.images; ++b) {
    const CosineCost cost(p, row_start[b + 1] - row_start[b]);
    pooled += cost.pooled();
    gram += own.matrix ? cost.gram(8, 3.0 / 8) : cost.gram(2, 1);
  }
  return pooled < gram ? select_kernels(Dtype::float32, p.dim) : own;
}

// Divides the images into groups: a group ends with the image that brings it to `rows` rows or to `images` images.
// Returns the first image of each group, then the end.
inline std::vector<int64_t> group_images(const std::vector<int64_t>& row_start, int64_t rows, int64_t images) {
  std::vector<int64_t> groups{0};
  const int64_t end = (int64_t)row_start.size() - 1;
  for (int64_t b = 1; b <= end; ++b)
    if (b == end || row_start[b] - row_start[groups.back()] >= rows || b - groups.back() == images) groups.push_back(b);
  return groups;
}

// The plan of the forward, or of the backward of the dot and cosine forms.
struct Plan {
  const Kernels& kernels;
  const CompatibilityParams p;
  bool backward, cosine, means;
  bool by_image;                   // tasks of weights are whole images: cosine, and the sigmoid loss in one pass
  bool local_sums;                 // the patches' sums are kept for one chunk at a time, see Scratch
  int64_t row_align;               // the rows of an image are padded to a multiple of this
  int64_t units, dims;             // padded units of D, padded D
  int64_t image_rows;              // most rows of an image
  std::vector<int64_t> row_start;  // see count_rows
  int64_t chunk;                   // rows of a task
  int64_t rows_block, capacity;    // backward: rows in memory together
  int64_t texts_block;             // texts in memory together
  std::vector<int64_t> groups;     // forward: the images of each task, see group_images
  int64_t group, text_panels;      // forward: most images, and the panels of texts, of a task
  int64_t gram_capacity;
  int threads;
  int64_t shared_bytes, scratch_bytes;

  Plan(const CompatibilityParams& params, bool is_backward, const Kernels& used)
      : kernels(used),
        p(params),
        backward(is_backward),
        cosine(params.form == Form::cosine),
        means(is_backward && kernels.pair == 2 && params.temperature >= kMeanTemperature),
        by_image(cosine || params.loss_sums) {
    const int64_t tile = kernels.tile_rows, panel = kernels.panel, pair = kernels.pair;
    units = round_up(ceil_div(p.dim, pair), panel);
    dims = round_up(p.dim, panel);
    row_align = by_image ? 2 * kernels.inner : 1;  // a product over the rows of an image takes `inner` units at a time
    image_rows = round_up(p.patches_per_image, row_align);
    row_start = count_rows(p, row_align);
    gram_capacity = round_up(image_rows, tile);
    // A chunk stays in the L2 cache, which is larger (Intel's 2 MiB) on processors with a matrix unit.
    const int64_t cache = kernels.matrix ? 2 : 1, most_rows = kernels.matrix ? (backward ? 128 : 256) : 112;
    chunk = most(1, least(most_rows, cache * 512 * 1024 / (4 * units)) / tile) * tile;

    const int64_t text_bytes = 4 * units + (backward && p.grad_patches ? 4 * dims / pair : 0);
    texts_block = most(1, least(backward ? 1024 : 4096, kTextsBudget / text_bytes) / panel) * panel;
    texts_block = least(texts_block, round_up(p.text_count, panel));
    local_sums = backward && !cosine && texts_block >= p.text_count;

    // Groups are of about as many rows, not images, so that packed or masked images of any sizes make equal tasks.
    const int64_t group_rows = cosine ? 1 : 4 * chunk;
    groups = group_images(row_start, group_rows, p.images);
    text_panels = ((int64_t)groups.size() - 1 >= 32 ? 1024 : kTextRange) / panel;
    text_panels = least(text_panels, texts_block / panel);
    groups = group_images(row_start, group_rows, most(1, 512 * 1024 / (12 * text_panels * panel)));
    group = 1;
    for (size_t i = 1; i < groups.size(); ++i) group = most(group, groups[i] - groups[i - 1]);

    const int64_t row_bytes =
        4 * (2 * units + texts_block + (p.grad_patches ? dims : 0)) + (pair == 2 ? 2 * 2 * dims : 0);
    // Where a task is an image, four of them in a block let as many threads work, if there is room.
    const int64_t most_rows_block = by_image ? most(1792, 4 * image_rows) : 1792;
    rows_block = most(1, least(most_rows_block, kRowsBudget / row_bytes) / chunk) * chunk;
    rows_block = least(rows_block, most(1, ceil_div(row_start.back(), chunk)) * chunk);
    if (by_image) rows_block = most(rows_block, image_rows);
    capacity = round_up(rows_block, 2 * tile) + 2 * tile + (means ? 2 * kMeans : 0);  // tiles read past the last row

    Arena counter{nullptr};
    Texts texts;
    take_texts(counter, texts);
    Rows rows[2];
    Weights weights;
    Sums sums;
    if (backward) take_block(counter, rows, weights, sums);
    shared_bytes = counter.used;
    counter.used = 0;
    Scratch scratch{};
    take_scratch(counter, scratch);
    scratch_bytes = counter.used;
    const int64_t beyond = scratch_bytes - (cosine ? 4 * gram_capacity * round_up(image_rows, panel) : 0);
    threads = (int)most(1, least(p.threads, (kBudget - shared_bytes) / most(1, beyond)));
  }

  int64_t workspace_bytes() const { return shared_bytes + threads * scratch_bytes + 64; }

  // Keeps the panels of a row from being a multiple of 4 KiB apart, where they would share one set of the L1 cache.
  int64_t local_capacity() const { return round_up(chunk, 32) + 2; }

  void take_texts(Arena& arena, Texts& texts) const {
    texts.transposed = arena.take(units * texts_block);
    texts.row_units = backward && p.grad_patches ? arena.take(dims * texts_block / kernels.pair) : nullptr;
    texts.inv_norm = arena.take(texts_block);
  }

  void take_rows(Arena& arena, Rows& rows, int64_t size, bool as_right_operand) const {
    rows.capacity = size;
    rows.units = arena.take(units * size);
    rows.row_units = kernels.pair == 1 ? rows.units : as_right_operand ? arena.take(dims * size / 2) : nullptr;
    rows.inv_norm = arena.take(size);
    rows.range_scale = arena.take(size);
    rows.image = arena.take<int32_t>(size);
    rows.index = arena.take<int32_t>(size);
  }

  void take_block(Arena& arena, Rows (&rows)[2], Weights& weights, Sums& sums) const {
    for (Rows& half : rows) take_rows(arena, half, capacity, p.grad_texts || (cosine && p.grad_patches));
    weights.units = arena.take(capacity * round_up(texts_block, 2 * kernels.panel) / kernels.pair);
    weights.row_units =
        kernels.pair == 1 ? weights.units : arena.take(round_up(capacity / 2, kernels.panel) * texts_block);
    sums = {.panels = nullptr, .capacity = capacity, .first = 0, .means = nullptr};
    if (!p.grad_patches) return;
    if (!local_sums) sums.panels = arena.take(capacity * dims);
    if (means) sums.means = arena.take(kMeansCapacity * dims);
  }

  void take_scratch(Arena& arena, Scratch& s) const {
    const int64_t panel = kernels.panel, rows = by_image ? gram_capacity : chunk, columns = round_up(image_rows, panel);
    s.row = arena.take(most(panel * units, 2 * dims));
    s.scores = arena.take((rows + panel) * panel);
    s.rows.capacity = rows;
    s.sums = local_sums && p.grad_patches ? arena.take(local_capacity() * dims) : nullptr;
    if (!backward) {
      take_rows(arena, s.rows, rows, false);
      s.largest = arena.take(group * text_panels * panel);
      s.sum = arena.take(group * text_panels * panel);
      s.weighted = arena.take(group * text_panels * panel);
    }
    if (!cosine) return;
    const int64_t matrix = rows * columns, square = panel * panel;
    const bool pairs = kernels.pair == 2;
    s.attention = arena.take((rows + panel) * panel);
    s.gram_attention = arena.take((rows + panel) * panel);
    s.transposed = arena.take(units * panel);
    s.gram = arena.take(matrix);
    const int64_t half = rows * round_up(columns, 2 * panel) / 2;
    if (kernels.matrix) {
      s.gram_high = arena.take(half);
      s.gram_low = arena.take(half);
      s.attention_high = arena.take((rows + panel) * panel / 2);
      s.attention_low = arena.take((rows + panel) * panel / 2);
    }
    s.pooled_patch = arena.take(dims * panel);
    s.direction = arena.take(dims * panel);
    s.scaled = arena.take((rows + panel) * panel);
    if (!backward) return;
    s.scaled_units = pairs ? arena.take((rows + panel) * panel) : nullptr;
    if (!p.grad_patches) return;
    s.attention_t = arena.take(square);
    s.attention_t_units = pairs ? arena.take(square / 2) : nullptr;
    // With the matrix unit, C reuses the memory of G, which is split by then, and C's units that of the split G.
    s.norm_term = kernels.matrix ? s.gram : arena.take(matrix);
    s.norm_term_units = kernels.matrix ? s.gram_high : pairs ? arena.take(half) : nullptr;
  }
};

}  // namespace
}  // namespace pacl
