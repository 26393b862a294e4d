// What becomes of a tile of scores in the registers: φ and the entropy (forward), or W (backward).

#pragma once

#include "pipeline.cuh"

namespace pacl::cuda {

constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float most_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// What a thread knows of its two rows: texts `row` and `row + 8` of the tile.
struct Rows {
  int64_t text[2];
  bool live[2];
  float inverse[2];

  __device__ __forceinline__ Rows(const Work& work, int64_t first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      text[r] = first + 8 * r;
      live[r] = text[r] < work.texts;
      inverse[r] = live[r] ? work.inverse_texts[text[r]] : 0.0f;
    }
  }
};

// Softmax sums of the forward over the patches of an image: of e, e x and, if kSafe, the maximum, x being s without the
// text's norm.
template <bool kSafe>
struct Softmax {
  float total[2], weighted[2], top[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] = weighted[r] = 0.0f, top[r] = -INFINITY;
  }

  __device__ __forceinline__ void add(int r, float x0, float x1, bool dead0, bool dead1, float scale) {
    x0 = dead0 ? 0.0f : x0;  // whatever is behind a mask, NaN too
    x1 = dead1 ? 0.0f : x1;
    float anchor = 0.0f;
    if constexpr (kSafe) {
      float raised = fmaxf(top[r], fmaxf(dead0 ? -INFINITY : x0, dead1 ? -INFINITY : x1));
      anchor = raised == -INFINITY ? 0.0f : raised;
      float shrink = top[r] == -INFINITY ? 0.0f : exp2_fast((top[r] - anchor) * scale);
      total[r] *= shrink, weighted[r] *= shrink, top[r] = raised;
    }
    float e0 = exp2_fast((x0 - anchor) * scale), e1 = exp2_fast((x1 - anchor) * scale);
    e0 = dead0 ? 0.0f : e0;
    e1 = dead1 ? 0.0f : e1;
    total[r] += e0 + e1;
    weighted[r] = fmaf(e0, x0, fmaf(e1, x1, weighted[r]));
  }

  // Writes φ and the entropy in bits of an image, 0 if it has no patch, and begins anew.
  __device__ __forceinline__ void finish(const Work& work, const Rows& rows, int64_t image, float scale, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float offset = 0.0f;
      if constexpr (kSafe) {
        float most = most_of_four(top[r]);
        float shrink = top[r] == -INFINITY ? 0.0f : exp2_fast((top[r] - most) * rows.inverse[r] * scale);
        total[r] *= shrink, weighted[r] *= shrink;
        offset = most == -INFINITY ? 0.0f : most * rows.inverse[r];
      }
      float all = sum_of_four(total[r]), mean = sum_of_four(weighted[r]);
      if (lane % 4 == 0 && rows.live[r] && image < work.images) {
        bool empty = all == 0.0f;
        float phi = empty ? 0.0f : mean / all * rows.inverse[r];
        int64_t at = image * work.stride_phi + rows.text[r];
        work.phi[at] = phi;
        work.stat[at] = empty ? 0.0f : log2f(all) + (offset - phi) * scale;
      }
    }
    clear();
  }
};

template <int kWidth, bool kPacked, bool kSafe>
__device__ __forceinline__ void forward_epilogue(
    const Work& work, const Rows& rows, const float (&acc)[kWidth / 2], const float* columns, int64_t image,
    bool last_chunk, float scale, int lane, Softmax<kSafe>& softmax) {
  float row_scale[2] = {rows.inverse[0] * scale, rows.inverse[1] * scale};
  int block_of_image = 0;
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
    bool dead0 = column.x < 0.0f, dead1 = column.y < 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      softmax.add(
          r, acc[4 * j + 2 * r] * column.x, acc[4 * j + 2 * r + 1] * column.y, dead0, dead1, row_scale[r]);
    if constexpr (kPacked) {
      if (++block_of_image == work.pitch / 8) {
        softmax.finish(work, rows, image++, scale, lane);
        block_of_image = 0;
      }
    }
  }
  if constexpr (kPacked) {
    softmax.clear();  // columns behind the last image of the tile
  } else {
    if (last_chunk) softmax.finish(work, rows, image, scale, lane);
  }
}

// Of four lanes each with two neighbours out of four blocks of eight columns, each gets one whole block.
__device__ __forceinline__ void exchange_blocks(uint32_t (&v)[4], int lane) {
  bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? other : v[i];
    v[i + 1] = odd ? v[i + 1] : other;
  }
  uint32_t first = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2);
  uint32_t second = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
  v[0] = high ? first : v[0], v[1] = high ? second : v[1];
  v[2] = high ? v[2] : first, v[3] = high ? v[3] : second;
}

// The first `count` of eight 16-bit elements; `elements` neighbours at a time where all are wanted.
__device__ __forceinline__ void store_block(uint16_t* to, const uint32_t (&v)[4], int count, int elements) {
  if (count == 8 && elements == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
  } else if (count == 8 && elements == 4) {
    reinterpret_cast<uint2*>(to)[0] = make_uint2(v[0], v[1]);
    reinterpret_cast<uint2*>(to)[1] = make_uint2(v[2], v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (elements >= 2 && 2 * i + 1 < count) {
        reinterpret_cast<uint32_t*>(to)[i] = v[i];
      } else {
        if (2 * i < count) to[2 * i] = static_cast<uint16_t>(v[i]);
        if (2 * i + 1 < count) to[2 * i + 1] = static_cast<uint16_t>(v[i] >> 16);
      }
    }
  }
}

// Four blocks of eight columns of both rows, of which this lane stores one: `count` patches of `image` from `n` on.
__device__ __forceinline__ void store_blocks(
    const Work& work, uint16_t* matrix, const Rows& rows, int64_t image, int n, int count, uint32_t (&out)[2][4],
    int lane) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    exchange_blocks(out[r], lane);
    if (count > 0 && rows.live[r])
      store_block(
          matrix + rows.text[r] * work.stride_weights + image * work.patches + n, out[r], count, work.store_elements);
  }
}

// What the backward knows of an image for a thread's two rows.
struct Known {
  float phi[2], stat[2], grad[2];

  __device__ __forceinline__ void load(const Work& work, const Rows& rows, int64_t image) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool there = rows.live[r] && image < work.images;
      int64_t at = image * work.stride_phi + rows.text[r];
      phi[r] = there && work.phi ? work.phi[at] : 0.0f;
      stat[r] = there ? work.stat[at] : 0.0f;
      grad[r] = there && work.grad_phi ? work.grad_phi[at] : 0.0f;
    }
  }
};

// Stores W = dS / (‖p‖ ‖t‖), or without `grad_phi` the attention; returns the tile's part of the temperature's sum.
template <int kWidth, bool kPacked, class T>
__device__ __forceinline__ float weights_epilogue(
    const Work& work, const Rows& rows, const float (&acc)[kWidth / 2], const float* columns, int64_t image,
    int chunk, float scale, float inverse_temperature, int lane, Known& known) {
  bool attention = work.grad_phi == nullptr;
  float weight_scale = work.weight_scale ? *work.weight_scale : 1.0f;
  int64_t image0 = image;
  int blocks_of_image = work.pitch / 8, block_of_image = 0;
  float temperature_sum = 0.0f;
#pragma unroll
  for (int j0 = 0; j0 < kWidth / 8; j0 += 4) {
    uint32_t out[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int j = j0 + i;
      if (j >= kWidth / 8) continue;
      float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
      bool dead0 = column.x < 0.0f, dead1 = column.y < 0.0f;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float w[2];
        float factor = known.grad[r] * rows.inverse[r] * weight_scale;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          bool dead = c ? dead1 : dead0;
          float inverse = c ? column.y : column.x;
          float x = acc[4 * j + 2 * r + c] * inverse;
          x = dead ? 0.0f : x;
          float centred = fmaf(x, rows.inverse[r], -known.phi[r]);
          float a = exp2_fast(fmaf(centred, scale, -known.stat[r]));
          a = dead ? 0.0f : a;
          w[c] = attention ? a : a * (fmaf(centred, inverse_temperature, 1.0f) * factor) * inverse;
          temperature_sum = fmaf(a * centred, centred * known.grad[r], temperature_sum);
        }
        out[r][i] = work.weights_in_half ? pack(w[0], w[1], __half()) : pack(w[0], w[1], __nv_bfloat16());
      }
      if constexpr (kPacked) {
        if (++block_of_image == blocks_of_image) {
          known.load(work, rows, ++image);
          block_of_image = 0;
        }
      }
    }
    int block = j0 + lane % 4;
    int64_t of_image = image0;
    int n = chunk * kWidth + 8 * block;
    if constexpr (kPacked) {
      int which = block / blocks_of_image;
      of_image += which;
      n = 8 * (block - which * blocks_of_image);
    }
    bool inside = block < kWidth / 8 && of_image < work.images && (!kPacked || of_image < image0 + work.images_of_tile);
    store_blocks(work, work.weights, rows, of_image, n, inside ? min(8, work.patches - n) : 0, out, lane);
  }
  return temperature_sum;
}

}  // namespace pacl::cuda
