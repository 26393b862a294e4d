// The epilogues of the sigmoid loss. A tile with all patches of an image has φ of its pairs, so it computes their loss
// and ∂L/∂φ, and turns the same scores into W.

#pragma once

#include "cosine.cuh"

namespace pacl::cuda {

// Target and bias of a thread's two pairs. A bias of -inf takes a pair out, also one past the last text.
struct LossPairs {
  float target[2], bias[2];

  __device__ __forceinline__ LossPairs(const Work& work, const Rows& rows, int image) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int text = rows.text[r];
      target[r] = 0.0f, bias[r] = -INFINITY;
      if (!rows.are_there(work, r)) continue;
      int64_t at = image * work.phi_stride + text;
      bias[r] = work.pair_bias ? work.pair_bias[at] : 0.0f;
      if (work.targets) {
        target[r] = work.targets[at];
      } else {
        // Without ids they are the numbers of image and text.
        int64_t of_image = work.image_ids ? work.image_ids[image] : image + work.own_text;
        int64_t of_text = work.image_ids ? work.text_ids[text] : text;
        target[r] = of_image >= 0 && of_image == of_text ? 1.0f : 0.0f;
      }
    }
  }
};

// The sums of four threads that share two rows, in shared memory. The first of the four adds to them.
struct LossSums {
  double* of_row;  // [kLossSums], 32 apart
  int lane;

  __device__ __forceinline__ void clear() const {
    if (lane % 4 != 0) return;
    for (int which = 0; which < kLossSums; ++which) of_row[32 * which] = 0.0;
  }

  __device__ __forceinline__ void add(float loss, float by_scale, float by_bias) const {
    if (lane % 4 != 0) return;
    of_row[0] += loss;
    of_row[32] += by_scale;
    of_row[64] += by_bias;
  }

  __device__ __forceinline__ void add_temperature(float of_thread) const {
    float sum = sum_of_four(of_thread);
    if (lane % 4 == 0) of_row[96] += sum;
  }
};

// The loss of a thread's two pairs and its derivatives. With z the logit and t the target, the loss of a pair is
// -t log σ(z) - (1 - t) log σ(-z), and its derivative (1 - t) σ(z) - t σ(-z). Both are 0 for a pair that is out.
struct PairLoss {
  float loss = 0.0f, by_scale = 0.0f, by_bias = 0.0f;  // sums over the two pairs, without `share`
  float by_phi[2];

  __device__ __forceinline__ PairLoss(const Tile& tile, const float (&phi)[2]) {
    const Work& work = tile.work;
    LossPairs pairs(work, tile.rows, tile.image);  // loaded only now: with the sums of scores they would be spilled
    float logit_scale = work.logit_scale_at ? *work.logit_scale_at : work.logit_scale;
    float logit_bias = work.logit_bias_at ? *work.logit_bias_at : work.logit_bias;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool in = pairs.bias[r] != -INFINITY;
      float z = fmaf(phi[r], logit_scale, logit_bias) + pairs.bias[r], t = pairs.target[r];
      float e = expf(-fabsf(z)), inverse = 1.0f / (1.0f + e), other = e * inverse;
      bool above = z >= 0.0f;
      float by_logit = (1.0f - t) * (above ? inverse : other) - t * (above ? other : inverse);
      by_logit = in ? by_logit : 0.0f;
      loss += in ? log1pf(e) + t * fmaxf(-z, 0.0f) + (1.0f - t) * fmaxf(z, 0.0f) : 0.0f;
      by_scale += in ? by_logit * phi[r] : 0.0f;
      by_bias += by_logit;
      by_phi[r] = by_logit * work.share * logit_scale;
      if (work.grad_pair_bias && tile.lane % 4 == 0 && tile.rows.are_there(work, r))
        work.grad_pair_bias[tile.image * work.phi_stride + tile.rows.text[r]] = by_logit * work.share;
    }
  }
};

// Stores W of the `dot` form, and adds the tile's part to the sums of the loss. kFull: as in dot_weights_epilogue, and
// for a temperature below kRunningMaxBelow.
template <int kWidth, bool kFull, class T>
__device__ __forceinline__ void dot_sigmoid_epilogue(const Tile& tile, Outlet& outlet, const float (&acc)[kWidth / 2],
                                                     const LossSums& sums) {
  Softmax<kFull> softmax;
  softmax.clear();
  dot_forward_epilogue<kWidth, false>(tile, acc, false, softmax);
  Known known;
  softmax.result(tile.rows, tile.scale, known.phi, known.state);
  PairLoss pair(tile, known.phi);
#pragma unroll
  for (int r = 0; r < 2; ++r) known.grad[r] = pair.by_phi[r];
  sums.add(pair.loss, pair.by_scale, pair.by_bias);
  float temperature_sum = dot_weights_epilogue<kWidth, false, kFull, T>(tile, outlet, acc, known);
  if constexpr (kFull) sums.add_temperature(temperature_sum);
}

// Does the same for the `cosine` form, with the attention and the factors of the norm term; see
// cosine_weights_epilogue.
template <int kWidth, bool kFull, class T>
__device__ __forceinline__ void cosine_sigmoid_epilogue(const Tile& tile, Outlet& outlet, Attention<kWidth> attention,
                                                        const float (&gram_attention)[kWidth / 2], const DotResult& dot,
                                                        const LossSums& sums) {
  Moments moments;
  moments.clear();
  moments.template add<kWidth, true>(attention, gram_attention);
  Known known;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    known.phi[r] = dot.phi[r] / PooledNorm(moments.total[r], moments.squared[r]).radius;
    known.state[r] = dot.log_sum_exp[r];
  }
  PairLoss pair(tile, known.phi);
#pragma unroll
  for (int r = 0; r < 2; ++r) known.grad[r] = pair.by_phi[r];
  sums.add(pair.loss, pair.by_scale, pair.by_bias);
  float temperature_sum =
      cosine_weights_epilogue<kWidth, kFull, true, T>(tile, outlet, attention, gram_attention, moments, known);
  if constexpr (kFull) sums.add_temperature(temperature_sum);
}

}  // namespace pacl::cuda
