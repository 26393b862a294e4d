// The sigmoid loss of pairs and its gradient, for a panel of texts of one image at a time.
#pragma once

#include "softmax.h"

namespace {

using namespace pacl;

// Returns log(1 + e) for e in [0, 1], relative error about 1e-7: 2 atanh(e / (2 + e)).
inline V log_one_plus(V e) {
  const V s = e / (e + 2.0f), square = s * s;
  V p = fma(square, 1.0f / 15, broadcast(1.0f / 13));
  for (int odd = 11; odd > 1; odd -= 2) p = fma(p, square, broadcast(1.0f / (float)odd));
  return fma(p * square, s, s) * 2.0f;
}

// Adds the loss of the pairs of image `image` with the `live` texts from `text` on, and its gradients of logit scale
// and bias, to `sums`. Returns ∂L/∂φ of the pairs. With z the logit and t the target, the loss of a pair is -t log σ(z)
// - (1 - t) log σ(-z), and its derivative (1 - t) σ(z) - t σ(-z); both are 0 for a pair bias of -inf.
inline Lane pair_gradient(const CompatibilityParams& p, int64_t image, int64_t text, int64_t live, const V phi[2],
                          WeightSums& sums) {
  const int64_t at = image * p.text_count + text, count = least(live, kPanel);
  float target[kPanel] = {};
  if (p.targets)
    memcpy(target, p.targets + at, sizeof(float) * count);
  else if (p.image_ids)
    for (int64_t i = 0; i < count; ++i)
      target[i] = p.image_ids[image] >= 0 && p.image_ids[image] == p.text_ids[text + i] ? 1.0f : 0.0f;
  else if (image >= text && image < text + count)
    target[image - text] = 1.0f;
  const Lane pair_bias = p.pair_bias ? Lane(p.pair_bias + at, live) : Lane();
  const float share = 1.0f / (float)p.images;
  Lane gradient;
  V by_bias[2];
  const I lane = lane_numbers();
  for (int v = 0; v < 2; ++v) {
    const V z = fma(phi[v], p.logit_scale, broadcast(p.logit_bias)) + pair_bias.half[v], t = load(target + v * kLanes);
    const V e = exp2<true>(-maximum(z, -z), kLog2e), inverse = 1.0f / (e + 1.0f);
    const I above = z >= V{};
    const V of_z = select(above, inverse, e * inverse), of_minus_z = select(above, e * inverse, inverse);
    const V loss = log_one_plus(e) + t * maximum(-z, V{}) + (1.0f - t) * maximum(z, V{});
    const I in = (lane + (int32_t)(v * kLanes) < (int32_t)count) & (pair_bias.half[v] != broadcast(-__builtin_inff()));
    by_bias[v] = select(in, (1.0f - t) * of_z - t * of_minus_z, V{});
    sums.loss += sum(select(in, loss, V{}));
    sums.bias += sum(by_bias[v]);
    sums.scale += sum(select(in, by_bias[v] * phi[v], V{}));
    by_bias[v] *= share;
    gradient.half[v] = by_bias[v] * p.logit_scale;
  }
  if (p.grad_pair_bias) store_lanes(p.grad_pair_bias + at, by_bias, live);
  return gradient;
}

// Adds the pairs of an image without a valid patch, whose φ is 0.
inline void add_empty_image(const CompatibilityParams& p, int64_t image, WeightSums& sums) {
  const V phi[2]{};
  for (int64_t k = 0; k < p.text_count; k += kPanel) pair_gradient(p, image, k, p.text_count - k, phi, sums);
}

}  // namespace
