// The dot form's weights.
#pragma once

#include "sigmoid.h"
#include "weights.h"

namespace {

using namespace pacl;

// Turns raw products into weights, in place, for rows of one image and one panel of texts:
//   dS = a (g + β (s - φ)) with the attention a and β = g / τ, and W = (dS / ‖t‖ - c) / ‖p‖.
// Returns Σ g a (s - φ)² for the temperature's gradient if kSum, otherwise 0.
template <bool kRunningMax, bool kSum, bool kMean>
inline float dot_weights_of_segment(const float* inv_norm, int64_t count, const float* text_norm, float temperature,
                                    const Lane& phi, const Lane& state, const Lane& grad, const V mean[2],
                                    float* scores) {
  float total = 0;
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes), shift = state.half[v] * kLog2e;
    // Without a running maximum a = e^(s / τ) e^-state, and e^-state goes into g. With it a = e^((s - φ) / τ - state),
    // see params.h.
    const V g = kRunningMax ? grad.half[v] : grad.half[v] * exp2<true>(-shift);
    // Unused with a running maximum: at the smallest τ it overflows, and (s - φ) / τ does not.
    const V beta = g / temperature;
    const float scale = kLog2e / temperature, inv_temperature = 1.0f / temperature;
    V along{};
    for (int64_t r = 0; r < count; ++r) {
      float* at = scores + r * kPanel + v * kLanes;
      const V inv = norm * inv_norm[r], s = load(at) * inv, centred = s - phi.half[v];
      const V e = kRunningMax ? exp2<true>(fma(centred, scale, -shift)) : exp2<false>(s, scale);
      if (kSum) along = fma(e * centred, centred, along);
      const V gradient = kRunningMax ? e * g * fma(centred, inv_temperature, 1.0f) : e * fma(beta, centred, g);
      store(at, kMean ? fma(gradient, norm, -mean[v]) * inv_norm[r] : gradient * inv);
    }
    if (kSum) total += sum(along * g);
  }
  return total;
}

// Computes φ, the state and ∂L/∂φ of a whole image, the first `count` rows of scratch.scores, for one panel of texts.
inline void dot_in_one_pass(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                            const Texts& texts, int64_t panel, Scratch& scratch, Lane& phi, Lane& state, Lane& grad,
                            WeightSums& sums) {
  Softmax running;
  for (int v = 0; v < 2; ++v) {
    running.largest[v] = broadcast(kBelowEveryScore);
    running.sum[v] = running.weighted[v] = V{};
  }
  Rows image = rows;
  image.inv_norm += first;
  const auto add = omits_running_max(p) ? accumulate<false> : accumulate<true>;
  add(running, image, 0, count, texts.inv_norm + panel * kPanel, p.temperature, scratch.scores, nullptr);
  dot_from_softmax(p, running, phi.half, state.half);
  const int64_t k = panel * kPanel;
  grad = pair_gradient(p, rows.image[first], texts.first + k, texts.count - k, phi.half, sums);
}

template <class Op>
WeightSums dot_weights(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                       int64_t panel_first, int64_t panel_last, Weights& to, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p);
  const bool sum = p.grad_temperature;
  const auto to_weights =
      rows.means ? (sum ? dot_weights_of_segment<false, true, true> : dot_weights_of_segment<false, false, true>)
      : omits_running_max(p)
          ? (sum ? dot_weights_of_segment<false, true, false> : dot_weights_of_segment<false, false, false>)
          : (sum ? dot_weights_of_segment<true, true, false> : dot_weights_of_segment<true, false, false>);
  const float* left = rows.units + first * kPanel;
  Ahead ahead = ahead_of_left<Op>(left, rows.capacity, last - first, inner);
  WeightSums sums;
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    scores_of_panel<Op>(p, rows, first, last - first, texts, panel, scratch, ahead);
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = segment_end(rows, begin, last);
      float* scores = scratch.scores + (begin - first) * kPanel;
      if (rows.image[begin] < 0) {
        memset(scores, 0, sizeof(float) * (end - begin) * kPanel);
        continue;
      }
      const int64_t at = rows.image[begin] * p.text_count + texts.first + k;
      Lane phi, state, g;
      if (p.loss_sums)
        dot_in_one_pass(p, rows, begin, end - begin, texts, panel, scratch, phi, state, g, sums);
      else
        phi = Lane(p.phi + at, live), state = Lane(p.state + at, live), g = Lane(p.grad_phi + at, live);
      if (!needs_weights(p)) continue;
      V mean[2]{};
      if (rows.means) {  // Σ dS = g
        const int64_t i = mean_of_row(rows, begin);
        for (int v = 0; v < 2; ++v) mean[v] = g.half[v] * rows.share[i];
        store_mean<Op>(rows, i, texts.inv_norm + k, panel, begin == rows.image_begin[i], to, texts, mean);
      }
      sums.temperature += to_weights(rows.inv_norm + begin, end - begin, texts.inv_norm + k, p.temperature, phi, state,
                                     g, mean, scores);
      measure_rounding<Op>(p, scores, rows.inv_norm + begin, end - begin, rows.image[begin], texts.inv_norm + k, panel,
                           sums);
    }
    if (needs_weights(p)) store_weights<Op>(scratch.scores, rows, first, last, texts, panel, to);
  }
  return sums;
}

}  // namespace
