// The dot form's weights, and the storing of any weights.
#pragma once

#include "softmax.h"

namespace {

using namespace pacl;

// A panel of weights [first, last) in float32, into the units of the two products.
template <class Op>
void store_weights(const float* panel_weights, const Rows& rows, int64_t first, int64_t last, int64_t panel,
                   Weights& to) {
#if defined(__AVX512BF16__)
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

// From raw products to weights, in place, for rows of one image and one panel of texts:
//   dS = a (g + β (s - φ)) with the attention a and β = g / τ, and W = dS / (‖p‖ ‖t‖).
// Returns Σ g a (s - φ)², which only the temperature's gradient needs.
template <bool kBounded, bool kSum>
inline float dot_weights(const float* inv_norm, int64_t count, const float* text_norm, float temperature,
                         const Lane& phi, const Lane& lse, const Lane& grad, float* scores) {
  float total = 0;
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes), shift = lse.half[v] * kLog2e;
    // Bounded: a = e^(s / τ) e^-lse, a factor. Otherwise a = e^((s - φ) / τ - lse), see score.h.
    const V g = kBounded ? grad.half[v] * exp2<true>(-shift) : grad.half[v];
    const V beta = g / temperature;
    const float scale = kLog2e / temperature;
    V along{};
    for (int64_t r = 0; r < count; ++r) {
      float* at = scores + r * kPanel + v * kLanes;
      const V inv = norm * inv_norm[r], s = load(at) * inv, centred = s - phi.half[v];
      const V e = exp2<!kBounded>(kBounded ? s * scale : centred * scale - shift);
      if (kSum) along += e * centred * centred;
      store(at, e * (g + beta * centred) * inv);
    }
    if (kSum) total += sum(along * g);
  }
  return total;
}

template <class Op>
double weights_dot(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                   int64_t panel_first, int64_t panel_last, Weights& to, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p);
  const auto to_weights = is_bounded(p) ? (p.grad_temperature ? dot_weights<true, true> : dot_weights<true, false>)
                                        : (p.grad_temperature ? dot_weights<false, true> : dot_weights<false, false>);
  const float* left = rows.units + first * kPanel;
  Ahead ahead = ahead_of_left(left, rows.capacity, last - first, inner);
  double total = 0;
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    product<Op>(left, rows.capacity, last - first, texts.transposed + panel * units * kPanel, inner, scratch.scores,
                false, &ahead);
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = segment_end(rows, begin, last);
      float* scores = scratch.scores + (begin - first) * kPanel;
      if (rows.image[begin] < 0) {
        memset(scores, 0, sizeof(float) * (end - begin) * kPanel);
        continue;
      }
      const int64_t at = rows.image[begin] * p.texts_count + texts.first + k;
      total += to_weights(rows.inv_norm + begin, end - begin, texts.inv_norm + k, p.temperature, Lane(p.phi + at, live),
                          Lane(p.lse + at, live), Lane(p.grad_phi + at, live), scores);
    }
    store_weights<Op>(scratch.scores, rows, first, last, panel, to);
  }
  return total;
}

}  // namespace
