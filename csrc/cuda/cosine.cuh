// The epilogues of the `cosine` form. The attention of a tile stays in registers, as the left operand of a second
// product with the image's Gram matrix, and q = G a (gram_attention) reuses the registers of the scores. Or the
// attention is read from memory, besides its products with the Gram matrix; an image may then have several tiles.

#pragma once

#include "epilogues.cuh"

namespace pacl::cuda {

// The attention in float16, as wgmma's left operand: of each 16 columns, rows `row` and `row + 8` of the first eight,
// then of the others.
template <int kWidth>
using Attention = uint32_t (&)[(kWidth + 15) / 16][4];

// Returns the attention for accumulators `at` and `at + 1`, which are neighbours in a row.
template <int kWidth>
__device__ __forceinline__ float2 attention_at(Attention<kWidth> attention, int at) {
  return unpack(attention[at / 8][at / 2 % 4], __half());
}

// Results of the `dot` form that the forward of `cosine` uses.
struct DotResult {
  float phi[2], log_sum_exp[2];  // the latter in bits
};

// Loads them from φ and the entropy in memory.
__device__ __forceinline__ DotResult dot_result_of(const Tile& tile) {
  Known known;
  known.load(known.phi, tile.work.phi, tile.work, tile.rows, tile.image);
  known.load(known.state, tile.work.state, tile.work, tile.rows, tile.image);
  DotResult dot;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    dot.phi[r] = known.phi[r], dot.log_sum_exp[r] = fmaf(known.phi[r], tile.scale, known.state[r]);
  return dot;
}

// Turns the scores of a tile, which holds one image, into its attention.
template <int kWidth>
__device__ __forceinline__ DotResult attention_of(const Rows& rows, float (&acc)[kWidth / 2], const float* columns,
                                                  float scale, int lane, Attention<kWidth> attention) {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f}, inverse[2];
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float of_column = i % 2 ? column.y : column.x;
      float& x = acc[4 * j + i];
      x = of_column < 0.0f ? -INFINITY : __fmul_rn(x, of_column);  // a masked patch may hold anything, also NaN
      most[i / 2] = fmaxf(most[i / 2], x);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = max_of_four(most[r]);
    if (most[r] == -INFINITY) most[r] = 0.0f;  // no patch
  }
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    int r = i / 2 % 2;
    bool dead = acc[i] == -INFINITY;
    float x = dead ? 0.0f : acc[i];
    float e = exp2_fast((x - most[r]) * (rows.inverse[r] * scale));
    e = dead ? 0.0f : e;
    total[r] += e;
    weighted[r] = fmaf(e, x, weighted[r]);
    acc[i] = e;
  }
  DotResult dot;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float all = sum_of_four(total[r]), mean = sum_of_four(weighted[r]);
    bool empty = all == 0.0f;
    inverse[r] = empty ? 0.0f : 1.0f / all;
    dot.phi[r] = mean * inverse[r] * rows.inverse[r];
    // Round the product as attention_again does.
    dot.log_sum_exp[r] = empty ? 0.0f : log2f(all) + __fmul_rn(most[r], rows.inverse[r] * scale);
  }
#pragma unroll
  for (int k = 0; k < (kWidth + 15) / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = 8 * k + 2 * i, r = i % 2;  // rows `row` and `row + 8` of one block of eight columns, then of the other
      attention[k][i] = at < kWidth / 2 ? pack(acc[at] * inverse[r], acc[at + 1] * inverse[r], __half()) : 0;
    }
  return dot;
}

// Computes the same attention from the log-sum-exp, for the backward.
template <int kWidth>
__device__ __forceinline__ void attention_again(const Rows& rows, const Known& known, const float (&acc)[kWidth / 2],
                                                const float* columns, float scale, int lane,
                                                Attention<kWidth> attention) {
#pragma unroll
  for (int j = 0; j < (kWidth + 15) / 16 * 2; ++j) {
    float2 column = {kDeadColumn, kDeadColumn};
    if (j < kWidth / 8) column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (j >= kWidth / 8) continue;
        float inverse = c ? column.y : column.x;
        float x = acc[4 * j + 2 * r + c] * inverse;
        a[c] = exp2_fast(__fmul_rn(x, rows.inverse[r] * scale) - known.state[r]);
        a[c] = inverse < 0.0f ? 0.0f : a[c];
      }
      attention[j / 2][j % 2 * 2 + r] = pack(a[0], a[1], __half());
    }
  }
}

// Loads the attention of the patches from `column` on from memory.
template <int kWidth>
__device__ __forceinline__ void load_attention(const Work& work, const Rows& rows, int image, int column, int lane,
                                               Attention<kWidth> attention) {
  column += 2 * (lane % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint16_t* row = work.attention + (image * work.texts + rows.text[r]) * work.attention_stride + column;
    int left = rows.are_there(work, r) ? work.patches - column : 0;
#pragma unroll
    for (int j = 0; j < (kWidth + 15) / 16 * 2; ++j) {
      bool there = j < kWidth / 8 && 8 * j < left;  // a zero follows an odd last patch
      attention[j / 2][j % 2 * 2 + r] = there ? *reinterpret_cast<const uint32_t*>(row + 8 * j) : 0;
    }
  }
}

// Returns log2 of an attention. For 0 any finite number will do: it uses the smallest positive float16.
__device__ __forceinline__ float bits_of(float a) { return log2_fast(fmaxf(a, 0x1p-24f)); }

// A thread's part of Σ a, Σ a q and Σ a log2 a for its rows. The sums use the rounded attention, so that terms that
// must cancel do so exactly.
struct Moments {
  float total[2], squared[2], weighted[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] = squared[r] = weighted[r] = 0.0f;
  }

  template <int kWidth, bool kWeighted>
  __device__ __forceinline__ void add(Attention<kWidth> attention, const float (&gram_attention)[kWidth / 2]) {
#pragma unroll
    for (int at = 0; at < kWidth / 2; at += 2) {
      int r = at / 2 % 2;
      float2 a = attention_at<kWidth>(attention, at);
      squared[r] = fmaf(a.x, gram_attention[at], fmaf(a.y, gram_attention[at + 1], squared[r]));
      if constexpr (kWeighted) weighted[r] = fmaf(a.x, bits_of(a.x), fmaf(a.y, bits_of(a.y), weighted[r]));
      total[r] += a.x + a.y;
    }
  }
};

// The norm of a row's pooled patch, computed from the sums of its four threads.
struct PooledNorm {
  float total, squared;  // Σ a and aᵀ G a
  float radius;          // the norm, at least kMinPooledNorm
  bool above_floor;      // the norm is greater than kMinPooledNorm

  __device__ __forceinline__ PooledNorm(float a_sum, float square_sum) {
    total = sum_of_four(a_sum), squared = sum_of_four(square_sum);
    radius = sqrtf(squared < 0.0f ? 0.0f : squared) / (total == 0.0f ? 1.0f : total);  // NaN stays
    above_floor = radius > kMinPooledNorm;
    radius = radius < kMinPooledNorm ? kMinPooledNorm : radius;
  }
};

// Stores φ and the log-sum-exp.
__device__ __forceinline__ void cosine_forward_epilogue(const Tile& tile, const DotResult& dot,
                                                        const Moments& moments) {
  const Work& work = tile.work;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    PooledNorm found(moments.total[r], moments.squared[r]);
    if (tile.lane % 4 == 0 && tile.rows.are_there(work, r) && tile.image < work.images) {
      int64_t to = tile.image * work.phi_stride + tile.rows.text[r];
      work.phi[to] = dot.phi[r] / found.radius;
      work.state[to] = dot.log_sum_exp[r];
    }
  }
}

// Stores W `[texts, images patches]`, the factors c of the norm term Σ c a aᵀ, `[images, texts]`, and if kKeep the
// attention `[images, texts, attention_stride]`. Returns the tile's part of the temperature's sum.
// dS = g (a / r) (1 + (s - u) / τ - (u / r² τ) (q - r²)). If r is at its floor it is a constant, and the last term is
// 0. (s - u) / τ is computed as log2(a) minus its mean, and r² as the mean of q, both over the rounded attention. Terms
// that must cancel then do so for any τ.
template <int kWidth, bool kFull, bool kKeep, class T, class Out>
__device__ __forceinline__ float cosine_weights_epilogue(const Tile& tile, Out& outlet, Attention<kWidth> attention,
                                                         const float (&gram_attention)[kWidth / 2],
                                                         const Moments& moments, const Known& known) {
  const Work& work = tile.work;
  const Rows& rows = tile.rows;
  float range_scale = work.range_scale ? *work.range_scale : 1.0f, inverse_scale = 1.0f / tile.scale;
  // W = a (log2(a) rate + constant + (q - mean_q) slope) / ‖p‖.
  float mean_bits[2], mean_q[2], bend_of_q[2], factor[2], rate[2], slope[2], constant[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    PooledNorm found(moments.total[r], moments.squared[r]);
    float share = 1.0f / (found.total == 0.0f ? 1.0f : found.total), inverse_radius = 1.0f / found.radius;
    mean_bits[r] = sum_of_four(moments.weighted[r]) * share;
    mean_q[r] = found.squared * share;
    float u = (known.state[r] + mean_bits[r]) * inverse_scale;
    float grad = known.grad[r] * inverse_radius, bend = u * inverse_radius * inverse_radius;
    bend_of_q[r] = found.above_floor ? bend * share * tile.inverse_temperature : 0.0f;  // q is not divided by Σ a
    factor[r] = grad * share;
    float all = factor[r] * rows.inverse[r] * range_scale;
    rate[r] = all * kLn2;
    slope[r] = -all * bend_of_q[r];
    constant[r] = all * fmaf(-mean_bits[r], kLn2, 1.0f);
    if (tile.chunk == 0 && tile.lane % 4 == 0 && rows.are_there(work, r) && tile.image < work.images)
      work.norm_factor[tile.image * work.texts + rows.text[r]] =
          (found.above_floor ? grad * bend : 0.0f) * share * share * range_scale;
  }
  float temperature_sum = 0.0f;
  auto kept = [&](int j, float2, int r) {
    float2 a = attention_at<kWidth>(attention, 4 * j + 2 * r);
    return pack(a.x, a.y, T());
  };
  auto pair = [&](int j, float2 column, int r) {
    int at = 4 * j + 2 * r;
    float2 both = attention_at<kWidth>(attention, at);
    float w[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float a = c ? both.y : both.x, bits = bits_of(a);
      float q = gram_attention[at + c] - mean_q[r];
      w[c] = a * fmaf(q, slope[r], fmaf(bits, rate[r], constant[r])) * (c ? column.y : column.x);
      if constexpr (kFull) {
        float above = (bits - mean_bits[r]) * kLn2;  // (s - u) / τ
        temperature_sum = fmaf(a * factor[r] * fmaf(-bend_of_q[r], q, above), above, temperature_sum);
      }
    }
    return pack(w[0], w[1], T());
  };
  auto behind = [] {};
#pragma unroll
  for (int j0 = 0; j0 < kWidth / 8; j0 += Out::kBlocks) {
    if constexpr (kKeep)
      outlet.template write_attention<kWidth, false>(work, tile.image, tile.chunk, j0, tile.columns, kept, behind);
    outlet.template write_weights<kWidth, false>(work, tile.image, tile.chunk, j0, tile.columns, pair, behind);
  }
  return temperature_sum;
}

}  // namespace pacl::cuda
