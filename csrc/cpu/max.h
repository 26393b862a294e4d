// The max form: φ is the largest score over the patches of an image; among equals the first patch wins. The forward
// stores the winner's index n in `state` (-1: no valid patch), so the backward needs no product. A patch gets Σ w t
// over the texts that it won, and a text Σ w p over the images' winners, where w = g / (|p| |t|). Both sums are then
// projected as in the other forms.
#pragma once

#include "gradients.h"
#include "softmax.h"

namespace {

using namespace pacl;

constexpr float kNoScore = -__builtin_inff();

// Updates the maximum and its index for one image and one panel of texts with the scores (raw products) of rows
// [row, last).
inline void accumulate_largest(V best[2], V index[2], const Rows& rows, int64_t row, int64_t last,
                               const float* text_norm, const float* scores) {
  const V norm[2] = {load(text_norm), load(text_norm + kLanes)};
  V largest[2] = {best[0], best[1]}, place[2] = {index[0], index[1]};
  for (int64_t r = row; r < last; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const V s = load(scores + r * kPanel + v * kLanes) * (norm[v] * rows.inv_norm[r]);
      const I stays = (s <= largest[v]) | (largest[v] != largest[v]);  // a NaN wins and stays
      largest[v] = select(stays, largest[v], s);
      place[v] = select(stays, place[v], broadcast((float)rows.index[r]));
    }
  for (int v = 0; v < 2; ++v) {
    best[v] = largest[v];
    index[v] = place[v];
  }
}

template <class Op>
void max_forward(const CompatibilityParams& p, const int64_t* row_start, int64_t first, int64_t last,
                 const Texts& texts, int64_t panel_first, int64_t panel_last, int64_t next, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), columns = (panel_last - panel_first) * kPanel;
  float *largest = scratch.largest, *index = scratch.sum;
  Rows& rows = scratch.rows;
  for (int64_t i = 0; i < (last - first) * columns; ++i) {
    largest[i] = kNoScore;
    index[i] = -1.0f;
  }
  for (int64_t row = row_start[first]; row < row_start[last]; row += rows.capacity) {
    const int64_t count = least(rows.capacity, row_start[last] - row);
    pack_rows<Op>(p, row_start, row, row + count, rows, 0, scratch.row);
    const int64_t following = row + count < row_start[last] ? row + count : row_start[least(next, p.images)];
    Ahead ahead = ahead_of_rows(p, row_start, following, rows.capacity,
                                product_steps<Op>(panel_last - panel_first, count, inner));
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      product<Op>(rows.units, rows.capacity, count, texts.transposed + panel * units * kPanel, inner, scratch.scores,
                  false, &ahead);
      for (int64_t begin = 0, end; begin < count; begin = end) {
        end = segment_end(rows, begin, count);
        const int64_t at = (rows.image[begin] - first) * columns + (panel - panel_first) * kPanel;
        V best[2] = {load(largest + at), load(largest + at + kLanes)};
        V place[2] = {load(index + at), load(index + at + kLanes)};
        accumulate_largest(best, place, rows, begin, end, texts.inv_norm + panel * kPanel, scratch.scores);
        for (int v = 0; v < 2; ++v) {
          store(largest + at + v * kLanes, best[v]);
          store(index + at + v * kLanes, place[v]);
        }
      }
    }
  }
  for (int64_t image = first; image < last; ++image)
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t at = (image - first) * columns + (panel - panel_first) * kPanel, k = panel * kPanel;
      const V place[2] = {load(index + at), load(index + at + kLanes)};
      V phi[2];
      for (int v = 0; v < 2; ++v) phi[v] = select(place[v] < V{}, V{}, load(largest + at + v * kLanes));
      store_lanes(p.phi + image * p.text_count + texts.first + k, phi, texts.count - k);
      store_lanes(p.state + image * p.text_count + texts.first + k, place, texts.count - k);
    }
}

// Computes sum [padded dim] (+)= Σ weights[i] rows[i] over `count` rows.
inline void add_rows(const float* const* rows, const float* weights, int64_t count, int64_t dims, float* sum,
                     bool add) {
  constexpr int kSums = kTileRows < 12 ? 6 : 16;
  int64_t d = 0;
  for (; d + kSums * kLanes <= dims; d += kSums * kLanes) {
    V part[kSums];
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) part[j] = V{};
    for (int64_t i = 0; i < count; ++i) {
      const float* row = rows[i] + d;
#pragma GCC unroll 16
      for (int j = 0; j < kSums; ++j) part[j] = fma(load(row + j * kLanes), weights[i], part[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) {
      float* at = sum + d + j * kLanes;
      store(at, add ? load(at) + part[j] : part[j]);
    }
  }
  for (; d < dims; d += kLanes) {
    V part{};
    for (int64_t i = 0; i < count; ++i) part = fma(load(rows[i] + d), weights[i], part);
    store(sum + d, add ? load(sum + d) + part : part);
  }
}

// Reads texts [first, last) of the block as rows of float32, and computes their inverse norms.
void max_pack_texts(const CompatibilityParams& p, MaxBlock& block, int64_t first, int64_t last) {
  const int64_t dims = padded_dim(p.dim);
  for (int64_t k = first; k < last; ++k) {
    block.text[k] = row_units_at<Float32>(p.texts, (block.text_first + k) * p.text_strides.row, p.text_strides.dim,
                                          p.dim, p.dtype, dims, block.text_rows + k * dims);
    float range_scale;
    block.text_norm[k] = row_factor<Float32>(p, block.text[k], dims, block.text_rows + k * dims, range_scale);
  }
}

// Sorts the block's texts by the patch of `image` that they chose. The counting sort is stable.
void max_sort(const CompatibilityParams& p, MaxBlock& block, int64_t image) {
  const float* chosen = p.state + image * p.text_count + block.text_first;
  const int64_t first = block.images.patch_first, patches = block_patches(p, block.images, image);
  int32_t* order = block.order + (image - block.images.first) * block.text_count;
  int32_t* start = block.start + block_patch(p, block.images, image) + image - block.images.first;
  memset(start, 0, sizeof(int32_t) * (patches + 1));
  for (int64_t k = 0; k < block.text_count; ++k) {
    const int64_t n = (int64_t)chosen[k] - first;
    if (n >= 0 && n < patches) ++start[n];
  }
  int32_t end = 0;
  for (int64_t n = 0; n <= patches; ++n) start[n] = end += start[n];
  for (int64_t k = block.text_count; k-- > 0;) {  // backwards: each start moves down to its final value
    const int64_t n = (int64_t)chosen[k] - first;
    if (n >= 0 && n < patches) order[--start[n]] = (int32_t)k;
  }
}

// Adds the block's texts to the gradient of patches [first, last) of the block in one image, and stores the patches
// that won in block.patch for max_texts. With the last block of texts, writes the projected gradient to the caller's
// buffer.
void max_patches(const CompatibilityParams& p, MaxBlock& block, int64_t image, int64_t first, int64_t last,
                 MaxScratch& scratch) {
  const int64_t dims = padded_dim(p.dim), width = p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t slots = block_patch(p, block.images, image), patches_at = image_offset(p, image);
  const int64_t gradient_at = first_patch(p, image) * p.dim;
  const int32_t* order = block.order + (image - block.images.first) * block.text_count;
  const int32_t* start = block.start + slots + image - block.images.first;
  const float* grad = p.grad_phi + image * p.text_count + block.text_first;
  const bool last_texts = block.text_first + block.text_count == p.text_count;
  for (int64_t r = first; r < last; ++r) {
    const int64_t slot = slots + r, n = block.images.patch_first + r, won = start[r + 1] - start[r];
    const float*& patch = block.patch[slot];
    if (block.text_first == 0) patch = nullptr;
    const bool seen = patch != nullptr;
    if (won > 0 && !seen) {
      patch = row_units_at<Float32>(p.patches, patches_at + n * p.patch_strides.row, p.patch_strides.dim, p.dim,
                                    p.dtype, dims, block.patch_rows + slot * dims);
      block.patch_norm[slot] =
          row_factor<Float32>(p, patch, dims, block.patch_rows + slot * dims, block.patch_range_scale[slot]);
    }
    if (!p.grad_patches) continue;
    float* sum = block.patch_sums ? block.patch_sums + slot * dims : scratch.sum;
    if (won > 0) {
      for (int64_t i = 0; i < won; ++i) {
        const int32_t k = order[start[r] + i];
        scratch.rows[i] = block.text[k];
        scratch.weights[i] = grad[k] * block.patch_norm[slot] * block.text_norm[k];
      }
      add_rows(scratch.rows, scratch.weights, won, dims, sum, seen);
    }
    if (!last_texts) continue;
    const int64_t offset = gradient_at + n * p.dim;
    if (patch)
      finish_row<Float32>(p, sum, 1, patch, 1, 0, block.patch_norm[slot], block.patch_range_scale[slot], p.dim, p.dtype,
                          p.grad_patches, offset, p.fresh_gradient, scratch.buffer);
    else
      memset((char*)p.grad_patches + offset * width, 0, p.dim * width);
  }
  store_fence();
}

// Adds the block's patches to texts_sum (rows of padded D) for texts [first, last) of the block.
void max_texts(const CompatibilityParams& p, const MaxBlock& block, int64_t first, int64_t last, MaxScratch& scratch) {
  const int64_t dims = padded_dim(p.dim);
  for (int64_t k = first; k < last; ++k) {
    int64_t count = 0, slots = 0;  // of the images before
    for (int64_t image = block.images.first; image < block.images.last; slots += patches_of(p, image++)) {
      const int64_t pair = image * p.text_count + block.text_first + k;
      const int64_t n = (int64_t)p.state[pair] - block.images.patch_first;
      if (n < 0 || n >= block.images.patches) continue;
      const int64_t slot = slots + n;
      scratch.rows[count] = block.patch[slot];
      scratch.weights[count++] = p.grad_phi[pair] * block.patch_norm[slot] * block.text_norm[k];
    }
    add_rows(scratch.rows, scratch.weights, count, dims, p.texts_sum + (block.text_first + k) * dims, true);
  }
}

void max_finish_texts(const CompatibilityParams& p, int64_t first, int64_t last, MaxScratch& scratch) {
  const int64_t dims = padded_dim(p.dim);
  for (int64_t k = first; k < last; ++k) {
    const float* text =
        row_units_at<Float32>(p.texts, k * p.text_strides.row, p.text_strides.dim, p.dim, p.dtype, dims, scratch.sum);
    float range_scale;
    const float inv_norm = row_factor<Float32>(p, text, dims, scratch.sum, range_scale);
    finish_row<Float32>(p, p.texts_sum + k * dims, 1, text, 1, 0, inv_norm, range_scale, p.dim, p.grad_texts_dtype,
                        p.grad_texts, k * p.dim, false, scratch.buffer);
  }
  store_fence();
}

}  // namespace
