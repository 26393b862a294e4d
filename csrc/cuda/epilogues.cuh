// The epilogues of the `dot` form: from a tile of scores in registers to φ and the entropy, the attention, or W.

#pragma once

#include "outlet.cuh"

namespace pacl::cuda {

constexpr float kLn2 = 0.6931471805599453f;
// Below this temperature the weights are computed from the rounded s - φ, above it from row constants that include φ.
constexpr float kExactBelow = 0.01f;

__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float max_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The two rows of a thread: texts `row` and `row + 8` of the tile.
struct Rows {
  int text[2];
  float inverse[2];

  __device__ __forceinline__ Rows(const Work& work, int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      text[r] = first + 8 * r;
      inverse[r] = are_there(work, r) ? work.inverse_texts[text[r]] : 0.0f;
    }
  }

  __device__ __forceinline__ bool are_there(const Work& work, int r) const { return text[r] < work.texts; }
};

// Softmax statistics of the forward over the patches of an image: the sums of e and e x and, if kRunningMax, the
// maximum. x is s without the text's norm.
//
// Here and below, __fmul_rn computes a product that takes part in a subtraction. Fused with the subtraction, s - max s
// and s - φ would be a rounding error where they must be 0, and it would be divided by the temperature.
template <bool kRunningMax>
struct Softmax {
  float total[2], weighted[2], top[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] = weighted[r] = 0.0f, top[r] = -INFINITY;
  }

  __device__ __forceinline__ void add(int r, float x0, float x1, bool dead0, bool dead1, float scale) {
    x0 = dead0 ? 0.0f : x0;  // a masked patch may hold anything, also NaN
    x1 = dead1 ? 0.0f : x1;
    float anchor = 0.0f;
    if constexpr (kRunningMax) {
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

  // Computes φ and the entropy (in bits) of an image, or 0 if it has no patch, in all four threads of a row.
  __device__ __forceinline__ void result(const Rows& rows, float scale, float (&phi)[2], float (&state)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float offset = 0.0f;
      if constexpr (kRunningMax) {
        float most = max_of_four(top[r]);
        float shrink = top[r] == -INFINITY ? 0.0f : exp2_fast((top[r] - most) * rows.inverse[r] * scale);
        total[r] *= shrink, weighted[r] *= shrink;
        offset = most == -INFINITY ? 0.0f : __fmul_rn(most, rows.inverse[r]);
      }
      float all = sum_of_four(total[r]), mean = sum_of_four(weighted[r]);
      bool empty = all == 0.0f;
      phi[r] = empty ? 0.0f : __fmul_rn(mean / all, rows.inverse[r]);
      state[r] = empty ? 0.0f : log2f(all) + (offset - phi[r]) * scale;
    }
  }

  // Stores them and clears the sums.
  __device__ __forceinline__ void finish(const Work& work, const Rows& rows, int image, float scale, int lane) {
    float phi[2], state[2];
    result(rows, scale, phi, state);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (lane % 4 == 0 && rows.are_there(work, r) && image < work.images) {
        int64_t at = image * work.phi_stride + rows.text[r];
        work.phi[at] = phi[r];
        work.state[at] = state[r];
      }
    }
    clear();
  }
};

// A tile whose products are in registers, seen from one thread of its warpgroup.
struct Tile {
  const Work& work;
  const Rows& rows;
  const float* columns;  // [kWidth], in shared memory
  int image, chunk;      // the first image, and the chunk of it
  float scale;           // log2(e) / τ
  float inverse_temperature;
  int lane;
};

// Adds the scores of a tile to `softmax`, which stores φ and the entropy once it has all chunks of an image.
template <int kWidth, bool kPacked, bool kRunningMax>
__device__ __forceinline__ void dot_forward_epilogue(const Tile& tile, const float (&acc)[kWidth / 2], bool last_chunk,
                                                     Softmax<kRunningMax>& softmax) {
  const Work& work = tile.work;
  const Rows& rows = tile.rows;
  float scale = tile.scale, row_scale[2] = {rows.inverse[0] * scale, rows.inverse[1] * scale};
  int image = tile.image, lane = tile.lane, block_of_image = 0;
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    float2 column = *reinterpret_cast<const float2*>(tile.columns + 8 * j + 2 * (lane % 4));
    bool dead0 = column.x < 0.0f, dead1 = column.y < 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      softmax.add(r, __fmul_rn(acc[4 * j + 2 * r], column.x), __fmul_rn(acc[4 * j + 2 * r + 1], column.y), dead0, dead1,
                  row_scale[r]);
    if constexpr (kPacked) {
      if (++block_of_image == work.pitch / 8) {
        softmax.finish(work, rows, image++, scale, lane);
        block_of_image = 0;
      }
    }
  }
  if constexpr (kPacked) {
    softmax.clear();  // drops the columns past the last image of the tile
  } else {
    if (last_chunk) softmax.finish(work, rows, image, scale, lane);
  }
}

// The values of an image that the backward reads for a thread's two rows.
struct Known {
  float phi[2], state[2], grad[2];

  __device__ __forceinline__ void load(const Work& work, const Rows& rows, int image) {
    load(phi, work.phi, work, rows, image);
    load(state, work.state, work, rows, image);
    load(grad, work.grad_phi, work, rows, image);
  }

  // Loads one of them from `from`, [images, phi_stride] or null: 0 where there is none.
  static __device__ __forceinline__ void load(float (&to)[2], const float* from, const Work& work, const Rows& rows,
                                              int image) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool there = from && rows.are_there(work, r) && image < work.images;
      to[r] = there ? from[image * work.phi_stride + rows.text[r]] : 0.0f;
    }
  }
};

// Constants of a row in a = exp2(x rate + offset) and W = a (x slope + constant) / ‖p‖. x is s - φ if kExact, otherwise
// s without the text's norm.
template <bool kExact>
struct Line {
  float rate, offset, slope, constant;

  __device__ __forceinline__ Line(const Tile& tile, const Known& known, int r, float range_scale) {
    const Rows& rows = tile.rows;
    float scale = tile.scale, inverse_temperature = tile.inverse_temperature;
    float factor = known.grad[r] * rows.inverse[r] * range_scale;
    rate = kExact ? scale : rows.inverse[r] * scale;
    offset = kExact ? -known.state[r] : fmaf(-known.phi[r], scale, -known.state[r]);
    slope = factor * inverse_temperature * (kExact ? 1.0f : rows.inverse[r]);
    constant = kExact ? factor : factor * fmaf(-known.phi[r], inverse_temperature, 1.0f);
  }
};

// Stores the attention in float16, `[images, texts, attention_stride]`. `known` has the entropy and φ of `dot`, or the
// log-sum-exp and 0. With kExact, for a temperature below kExactBelow, it is computed from the rounded s - φ.
template <int kWidth, bool kPacked, bool kExact, class Out>
__device__ __forceinline__ void attention_epilogue(const Tile& tile, Out& outlet, const float (&acc)[kWidth / 2],
                                                   Known& known) {
  const Work& work = tile.work;
  const Rows& rows = tile.rows;
  float scale = tile.scale;
  int image = tile.image, blocks_of_image = work.pitch / 8, block_of_image = 0;
  auto pair = [&](int j, float2 column, int r) {
    float rate = rows.inverse[r] * scale, offset = fmaf(-known.phi[r], scale, -known.state[r]), a[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float inverse = c ? column.y : column.x, x = acc[4 * j + 2 * r + c] * inverse;
      if constexpr (kExact)
        a[c] = exp2_fast(__fmul_rn(__fmul_rn(x, rows.inverse[r]) - known.phi[r], scale) - known.state[r]);
      else
        a[c] = exp2_fast(fmaf(x, rate, offset));
      a[c] = inverse < 0.0f ? 0.0f : a[c];  // a masked patch may hold anything, also NaN
    }
    return pack(a[0], a[1], __half());
  };
  auto behind = [&] {
    if constexpr (kPacked) {
      if (++block_of_image == blocks_of_image) {
        known.load(work, rows, ++image);
        block_of_image = 0;
      }
    }
  };
#pragma unroll
  for (int j0 = 0; j0 < kWidth / 8; j0 += Out::kBlocks)
    outlet.template write_attention<kWidth, kPacked>(work, tile.image, tile.chunk, j0, tile.columns, pair, behind);
}

// Stores W = dS / (‖p‖ ‖t‖), and returns the tile's part of the temperature's sum. kFull is needed for Work::full and
// for a temperature below kExactBelow. Without it, a column without a patch may hold anything: it is not stored.
template <int kWidth, bool kPacked, bool kFull, class T, class Out>
__device__ __forceinline__ float dot_weights_epilogue(const Tile& tile, Out& outlet, const float (&acc)[kWidth / 2],
                                                      Known& known) {
  const Work& work = tile.work;
  const Rows& rows = tile.rows;
  float range_scale = work.range_scale ? *work.range_scale : 1.0f;
  int image = tile.image, blocks_of_image = work.pitch / 8, block_of_image = 0;
  float temperature_sum = 0.0f;
  Line<kFull> lines[2] = {{tile, known, 0, range_scale}, {tile, known, 1, range_scale}};
  auto pair = [&](int j, float2 column, int r) {
    float w[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float inverse = c ? column.y : column.x;
      float x = acc[4 * j + 2 * r + c] * inverse;
      if constexpr (kFull) x = __fmul_rn(inverse < 0.0f ? 0.0f : x, rows.inverse[r]) - known.phi[r];
      float a = exp2_fast(fmaf(x, lines[r].rate, lines[r].offset));
      if constexpr (kFull) {
        a = inverse < 0.0f ? 0.0f : a;
        temperature_sum = fmaf(a * x, x * known.grad[r], temperature_sum);
      }
      w[c] = a * fmaf(x, lines[r].slope, lines[r].constant) * inverse;
    }
    return pack(w[0], w[1], T());
  };
  auto behind = [&] {
    if constexpr (kPacked) {
      if (++block_of_image == blocks_of_image) {
        known.load(work, rows, ++image);
#pragma unroll
        for (int r = 0; r < 2; ++r) lines[r] = {tile, known, r, range_scale};
        block_of_image = 0;
      }
    }
  };
#pragma unroll
  for (int j0 = 0; j0 < kWidth / 8; j0 += Out::kBlocks)
    outlet.template write_weights<kWidth, kPacked>(work, tile.image, tile.chunk, j0, tile.columns, pair, behind);
  return temperature_sum;
}

}  // namespace pacl::cuda
