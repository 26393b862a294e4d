// Storage of the weights W for both products, and a measurement of their rounding error.
#pragma once

#include "kept.h"
#include "rows.h"

namespace {

using namespace pacl;

// Sets scratch.scores to the raw products of `count` rows of the block from `first` on with one panel of texts: those
// that the forward kept, or computed again.
template <class Op>
void scores_of_panel(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count, const Texts& texts,
                     int64_t panel, Scratch& scratch, Ahead& ahead) {
  int64_t found = count, row = rows.first_row + first;
  if (p.score_blocks && p.form == Form::cosine) row = p.score_blocks->image_row[rows.image[first]];  // without padding
  if (const float* kept = kept_scores(p, kPanel, texts.first / kPanel + panel, row, found))
    memcpy(scratch.scores, kept, sizeof(float) * found * kPanel);
  else
    product<Op>(rows.units + first * kPanel, rows.capacity, count, texts.transposed + panel * dim_units<Op>(p) * kPanel,
                dim_inner<Op>(p), scratch.scores, false, &ahead);
}

// Returns false for a sigmoid loss without any gradient but those of scale and bias.
inline bool needs_weights(const CompatibilityParams& p) { return p.grad_patches || p.grad_texts || p.grad_temperature; }

// Returns the address of W' for text `k` of the block and pair `unit` of rows, in the matrix unit's left operand.
inline float* transposed_weight(const Weights& w, const Texts& texts, int64_t k, int64_t unit) {
  return w.row_units + (unit / kPanel * texts.padded + k) * kPanel + unit % kPanel;
}

// Stores a panel of float32 weights, rows [first, last), as units for the two products.
template <class Op>
void store_weights(const float* panel_weights, const Rows& rows, int64_t first, int64_t last,
                   [[maybe_unused]] const Texts& texts, int64_t panel, Weights& to) {
#if defined(PACL_PAIRS)
  if constexpr (Op::kMatrix) {
    for (int64_t r = first; r < last; r += 2 * kLanes)
      for (int v = 0; v < 2; ++v) {
        V units[kLanes];
        float* row = to.units + (panel / 2 * rows.capacity + r) * kPanel + panel % 2 * kLanes + v * kLanes / 2;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const float* pair = panel_weights + (r + 2 * i - first) * kPanel + v * kLanes;
          const H even = round_to_bfloat16(load(pair)), odd = round_to_bfloat16(load(pair + kPanel));
          memcpy(row + 2 * i * kPanel, &even, sizeof even);
          memcpy(row + (2 * i + 1) * kPanel, &odd, sizeof odd);
          units[i] = from_bits(zero_extend(even) | zero_extend(odd) << 16);
        }
        exchange_rows<kLanes / 2>(units);
        float* transposed = transposed_weight(to, texts, panel * kPanel + v * kLanes, r / 2);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(transposed + i * kPanel, units[i]);
      }
    return;
  }
  if (Op::kPair == 2) {
    for (int64_t r = first; r < last; r += 2) {
      H rounded[2][2];
      for (int odd = 0; odd < 2; ++odd) {
        float* units = to.units + (panel / 2 * rows.capacity + r + odd) * kPanel + panel % 2 * kLanes;
        for (int v = 0; v < 2; ++v) {
          rounded[odd][v] = round_to_bfloat16(load(panel_weights + (r + odd - first) * kPanel + v * kLanes));
          memcpy(units + v * kLanes / 2, &rounded[odd][v], sizeof(H));
        }
      }
      for (int v = 0; v < 2; ++v) {
        const I unit = zero_extend(rounded[0][v]) | zero_extend(rounded[1][v]) << 16;
        store(to.row_units + (panel * (rows.capacity / 2) + r / 2) * kPanel + v * kLanes, from_bits(unit));
      }
    }
    return;
  }
#endif
  memcpy(to.units + (panel * rows.capacity + first) * kPanel, panel_weights, sizeof(float) * (last - first) * kPanel);
}

// The rounding error of W is measured in one segment (rows of one image, a panel of texts) out of `measured_share`:
// in every segment of a small call, and in every eighth of a large one, which costs next to nothing.
constexpr int64_t kManySegments = 256, kMeasuredShare = 8;
inline int64_t measured_share(const CompatibilityParams& p) {
  return p.images * ceil_div(p.text_count, kPanel) < kManySegments ? 1 : kMeasuredShare;
}

// Adds the squared errors of the gradients from rounding a segment of W to 16 bits. With r the part of W lost, a text's
// error is the norm of Σ r p over the rows: at most Σ r ‖p‖ for patches of one direction, about sqrt(Σ r² ‖p‖²) for
// those of many. The estimate is the mean of both squares, and likewise over the texts for a patch's error.
template <class Op>
void measure_rounding([[maybe_unused]] const CompatibilityParams& p, [[maybe_unused]] const float* panel_weights,
                      [[maybe_unused]] const float* inv_norm, [[maybe_unused]] int64_t count,
                      [[maybe_unused]] int64_t image, [[maybe_unused]] const float* text_norm,
                      [[maybe_unused]] int64_t panel, [[maybe_unused]] WeightSums& sums) {
#if defined(PACL_PAIRS)
  const int64_t share = measured_share(p);
  if (Op::kPair == 1 || (image + panel) % share) return;
  V length[2], of_texts[2]{}, texts_squared[2]{};
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes);
    length[v] = select(norm > V{}, 1.0f / norm, V{});
  }
  double patches = 0, texts = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (inv_norm[r] == 0.0f) continue;
    V of_patch{}, patch_squared{};
    for (int v = 0; v < 2; ++v) {
      const V w = load(panel_weights + r * kPanel + v * kLanes), rest = w - from_bfloat16(round_to_bfloat16(w));
      const V to_text = rest / inv_norm[r], to_patch = rest * length[v];
      of_texts[v] += to_text;
      texts_squared[v] = fma(to_text, to_text, texts_squared[v]);
      of_patch += to_patch;
      patch_squared = fma(to_patch, to_patch, patch_squared);
    }
    const double error = sum(of_patch);
    patches += error * error + sum(patch_squared);
  }
  for (int v = 0; v < 2; ++v) texts += sum(of_texts[v] * of_texts[v]) + sum(texts_squared[v]);
  sums.patches_error += patches * share / 2;
  sums.texts_error += texts * share / 2;
#endif
}

// Computes c of W (see Weights) for image `i` of a block and one panel of texts: `mean`, about the mean of dS over the
// patches, becomes c. Of the tasks that share the image, the one with `first` stores it.
template <class Op>
void store_mean([[maybe_unused]] const Rows& rows, [[maybe_unused]] int64_t i, [[maybe_unused]] const float* text_norm,
                [[maybe_unused]] int64_t panel, [[maybe_unused]] bool first, [[maybe_unused]] Weights& to,
                [[maybe_unused]] const Texts& texts, [[maybe_unused]] V mean[2]) {
#if defined(PACL_PAIRS)
  if (Op::kPair == 1) return;
  const int64_t padding = i + 1 == rows.means ? round_up(rows.means, Op::kInner) - rows.means : 0;
  float* units = to.units + (panel / 2 * rows.capacity + row_of_mean<Op>(rows, i)) * kPanel + panel % 2 * kLanes;
  float* row_units = to.row_units + (panel * (rows.capacity / 2) + rows.count / 2 + i) * kPanel;
  for (int v = 0; v < 2; ++v) {
    const H rounded = round_to_bfloat16(mean[v] * load(text_norm + v * kLanes));
    mean[v] = from_bfloat16(rounded);
    if (!first) continue;
    memcpy(units + v * kLanes / 2, &rounded, sizeof rounded);
    const V both = from_bits(zero_extend(rounded) | zero_extend(rounded) << 16);
    if constexpr (Op::kMatrix)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t k = panel * kPanel + v * kLanes + lane, unit = rows.count / 2 + i;
        *transposed_weight(to, texts, k, unit) = both[lane];
        for (int64_t j = 1; j <= padding; ++j) *transposed_weight(to, texts, k, unit + j) = 0.0f;
      }
    else
      store(row_units + v * kLanes, both);
  }
  if (first && !Op::kMatrix) memset(row_units + kPanel, 0, sizeof(float) * padding * kPanel);
#endif
}

}  // namespace
