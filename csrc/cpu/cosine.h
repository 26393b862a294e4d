// The cosine form. With a the attention, q = G a, r² = aᵀ q and φ = u / r:
//   dS = g (a / r) (1 + (s - (φ / r) q) / τ).
// The norm term adds -C P̂ to the patches' gradient, with C[n, m] = Σ_k g (φ / r²) a_n a_m. At its floor r is a
// constant: q and C drop out, and s - (φ / r) q becomes s - φ r.
#pragma once

#include "cosine_gram.h"
#include "cosine_pooled.h"
#include "sigmoid.h"
#include "weights.h"

namespace {

using namespace pacl;

// Computes φ = u / max(r, floor) for the image in the first `count` rows of `rows`. u and r are not yet divided by Σ e,
// so the floor is multiplied by Σ e.
template <class Op>
void cosine_forward(const CompatibilityParams& p, const Rows& rows, int64_t count, const Texts& texts, int64_t panel,
                    Softmax& sums, Scratch& scratch, float* phi) {
  V along[2], squared[2];
  if (pools_patches<Op>(p, count)) {
    pool_patches(p, rows, 0, count, scratch);
    score_and_squared_norm<Op>(p, texts, panel, scratch, along, squared);
  } else {
    gram_attention<Op, true>(scratch, rows.capacity, count);
    for (int v = 0; v < 2; ++v) {
      along[v] = omits_running_max(p) ? sums.weighted[v] * (kLn2 * p.temperature)
                                      : fma(sums.largest[v], sums.sum[v], sums.weighted[v]);
      squared[v] = squared_norm_from_gram(scratch, count, v);
    }
  }
  if (cancels(scratch, rows.inv_norm, count, texts.inv_norm + panel * kPanel, squared)) {
    pool_patches_in_double<Op>(p, rows, 0, count, texts, panel, sums, scratch);
    score_and_squared_norm<Op>(p, texts, panel, scratch, along, squared);
  }
  for (int v = 0; v < 2; ++v)
    store(phi + v * kLanes, along[v] / maximum(kMinPooledNorm * sums.sum[v], square_root(squared[v])));
}

// Computes the softmax of a panel: scratch.scores becomes s, and scratch.attention e, not yet divided by Σ e. The sums
// are computed anew: the rounding of the forward's sums, divided by τ, would not cancel. `weighted` is
// Σ e (s - largest), with `largest` 0 unless kRunningMax.
template <bool kRunningMax>
inline void attend(Scratch& scratch, const float* inv_norm, int64_t count, const float* text_norm, float temperature,
                   Softmax& sums) {
  const float scale = kLog2e / temperature;
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes);
    V largest = kRunningMax ? broadcast(kBelowEveryScore) : V{};
    for (int64_t r = 0; kRunningMax && r < count; ++r)
      largest = maximum(load(scratch.scores + r * kPanel + v * kLanes) * (norm * inv_norm[r]), largest);
    sums.largest[v] = largest;
    sums.sum[v] = sums.weighted[v] = V{};
    for (int64_t begin = 0; begin < count; begin += kSumRows) {
      V part{}, part_weighted{};
      for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
        const int64_t i = r * kPanel + v * kLanes;
        const V s = load(scratch.scores + i) * (norm * inv_norm[r]), z = kRunningMax ? s - largest : s;
        const V e = exp2<kRunningMax>(z, scale);
        store(scratch.scores + i, s);
        store(scratch.attention + i, e);
        part += e;
        part_weighted = fma(e, z, part_weighted);
      }
      sums.sum[v] += part;
      sums.weighted[v] += part_weighted;
    }
  }
}

// Sets scratch.gram_attention, which holds q (s - slope q if `given`), to s - centre - slope q less its mean. The mean
// is a rounding error, which the division by τ would expose if all s are nearly equal.
inline void recentre(Scratch& scratch, int64_t count, const Softmax& sums, const V slope[2], const V centre[2],
                     bool given) {
  for (int v = 0; v < 2; ++v) {
    V mean{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      const V q = load(scratch.gram_attention + i),
              x = (given ? q : fma(-slope[v], q, load(scratch.scores + i))) - centre[v];
      store(scratch.gram_attention + i, x);
      mean = fma(load(scratch.attention + i), x, mean);
    }
    mean /= sums.sum[v];
    for (int64_t r = 0; r < count; ++r) {
      float* at = scratch.gram_attention + r * kPanel + v * kLanes;
      store(at, load(at) - mean);
    }
  }
}

// Turns scratch.scores into weights for half `v` of a panel, and fills scratch.scaled, the left factor of C. With
// kReady, scratch.gram_attention holds s - centre - slope q. Returns the temperature's sum.
template <bool kReady>
inline float cosine_weights_of_half(Scratch& scratch, const float* inv_norm, int64_t count, V norm, float temperature,
                                    V alpha, V slope, V centre, V largest, V along, V mean, int v) {
  const V beta = alpha / temperature, norm_factor = alpha * slope;  // beta overflows at the smallest temperatures
  const float inv_temperature = 1.0f / temperature;
  V total{};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = r * kPanel + v * kLanes;
    const V s = load(scratch.scores + i), e = load(scratch.attention + i), q = load(scratch.gram_attention + i);
    const V centred = kReady ? q : fma(-slope, q, s - centre);
    total = fma(e * centred, s - largest - along, total);
    const V gradient = kReady ? e * alpha * fma(centred, inv_temperature, 1.0f) : e * fma(beta, centred, alpha);
    store(scratch.scores + i, fma(gradient, norm, -mean) * inv_norm[r]);
    store(scratch.scaled + i, e * norm_factor);
  }
  return sum(total * alpha);
}

template <class Op>
WeightSums cosine_weights(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t last,
                          const Texts& texts, int64_t panel_first, int64_t panel_last, Weights& to,
                          const Sums& patch_sums, bool add, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), padded = last - first;
  const int64_t count = segment_end(rows, first, last) - first, capacity = scratch.rows.capacity;
  const float* left = rows.units + first * kPanel;
  const float* inv_norm = rows.inv_norm + first;
  const bool no_running_max = omits_running_max(p);
  bool norm_term_started = false;
  Ahead ahead = ahead_of_left<Op>(left, rows.capacity, count, inner);
  WeightSums total;
  if (!pools_patches<Op>(p, count)) {
    gram<Op>(p, rows, first, count, scratch, capacity);
    complete_symmetric(scratch.gram, capacity, count, inv_norm, 1.0f);
    split_gram<Op, false>(scratch, capacity, count);
  }
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    scores_of_panel<Op>(p, rows, first, count, texts, panel, scratch, ahead);
    Softmax sums;
    (no_running_max ? attend<false> : attend<true>)(scratch, inv_norm, count, texts.inv_norm + k, p.temperature, sums);
    V along[2], squared[2];  // u minus `largest`, and r²
    bool has_pooled_patch = pools_patches<Op>(p, count);
    if (has_pooled_patch) {
      pool_patches(p, rows, first, count, scratch);
      score_and_squared_norm<Op>(p, texts, panel, scratch, along, squared);
    } else {
      gram_attention<Op, false>(scratch, capacity, count);
      for (int v = 0; v < 2; ++v) squared[v] = squared_norm_from_gram(scratch, count, v);
    }
    const bool cancel = cancels(scratch, inv_norm, count, texts.inv_norm + k, squared);
    if (cancel) {
      pool_patches_in_double<Op>(p, rows, first, count, texts, panel, sums, scratch);
      score_and_squared_norm<Op>(p, texts, panel, scratch, along, squared);
      has_pooled_patch = true;
    }
    for (int v = 0; v < 2; ++v)
      along[v] = has_pooled_patch ? along[v] / sums.sum[v] - sums.largest[v] : sums.weighted[v] / sums.sum[v];
    V slope[2], radius[2], centre[2], phi[2];
    for (int v = 0; v < 2; ++v) {
      const V share = 1.0f / sums.sum[v], u = sums.largest[v] + along[v];  // a = e share
      radius[v] = square_root(squared[v]) * share;
      const I floored = radius[v] <= broadcast(kMinPooledNorm);
      radius[v] = select(floored, broadcast(kMinPooledNorm), radius[v]);
      slope[v] = select(floored, V{}, u / (radius[v] * radius[v]) * share);
      centre[v] = select(floored, u, V{});
      phi[v] = u / radius[v];
    }
    const Lane g = p.loss_sums ? pair_gradient(p, rows.image[first], texts.first + k, live, phi, total)
                               : Lane(p.grad_phi + rows.image[first] * p.text_count + texts.first + k, live);
    if (!needs_weights(p)) continue;
    if (has_pooled_patch) set_direction<Op>(p, texts, panel, slope, scratch);
    if (cancel)
      scores_in_double<Op>(p, rows, first, count, scratch, scratch.gram_attention);
    else if (has_pooled_patch)
      scores_of_direction(p, rows, first, count, scratch);
    const bool ready = has_pooled_patch || !no_running_max;
    if (ready) recentre(scratch, count, sums, slope, centre, has_pooled_patch);
    const auto to_weights = ready ? cosine_weights_of_half<true> : cosine_weights_of_half<false>;
    V mean[2]{};
    if (rows.means) {  // Σ dS = g / r
      for (int v = 0; v < 2; ++v) mean[v] = g.half[v] / (radius[v] * (float)count);
      store_mean<Op>(rows, mean_of_row(rows, first), texts.inv_norm + k, panel, true, to, texts, mean);
    }
    for (int v = 0; v < 2; ++v) {
      const V norm = load(texts.inv_norm + k + v * kLanes), alpha = g.half[v] / (radius[v] * sums.sum[v]);
      total.temperature += to_weights(scratch, inv_norm, count, norm, p.temperature, alpha, slope[v], centre[v],
                                      sums.largest[v], along[v], mean[v], v);
    }
    measure_rounding<Op>(p, scratch.scores, inv_norm, count, rows.image[first], texts.inv_norm + k, panel, total);
    memset(scratch.scores + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
    store_weights<Op>(scratch.scores, rows, first, last, texts, panel, to);
    if (!patch_sums.panels) continue;
    if (!has_pooled_patch) {
      add_norm_term<Op>(scratch, count, capacity, norm_term_started);
      norm_term_started = true;
      continue;
    }
    for (int64_t d = 0; !add && d < padded_dim(p.dim) / kPanel; ++d)
      memset(patch_sums.panels + (d * patch_sums.capacity + first) * kPanel, 0, sizeof(float) * padded * kPanel);
    add = true;
    subtract_pooled_patch(p, rows, first, count, patch_sums, scratch);
  }
  if (norm_term_started)
    subtract_norm_term_product<Op>(p, rows, first, count, padded, capacity, patch_sums, add, scratch);
  return total;
}

}  // namespace
