// The score product with its two epilogues, warp-specialised for Hopper.
//
// A block of three warpgroups works on 64 texts, which stay in shared memory where they fit, and walks through images:
// one warp feeds a ring of steps (64 dimensions of the patches of a tile) through the copy engine; two warpgroups take
// tiles in turn, so that the epilogue of one runs while the tensor cores work for the other. Texts are the rows of a
// tile and patches its columns: a softmax over patches runs along each thread's own accumulators, and |s| <= 1 makes it
// two plain sums. The two blocks of a cluster hold other texts and share every step of patches: each loads half of the
// steps into both.
//
// docs/cuda.md draws it. plan.h chooses the tile and deals out the work.

#pragma once

#include <cmath>
#include <cstdint>

#ifdef PACL_EMULATE
#include "emulator.h"
#else
#include "ptx.cuh"
#endif

#include "work.h"

namespace pacl::cuda {

enum class Epilogue { forward, forward_safe, weights, cosine };

constexpr int kThreads = 384;
constexpr int kWarpgroup = 128;
constexpr float kLog2e = 1.4426950408889634f;
template <int kWidth>
inline constexpr int kPooledRows = pooled_rows(kWidth);  // a function of the host cannot be named in the kernel
constexpr float kLeastRadius = 1e-6f;       // MIN_POOLED_NORM in reference.py
constexpr float kPlainTemperature = 0.05f;  // from here on exp(s / tau) <= e^20 needs no running maximum

// Barriers of a block by number; 0 belongs to __syncthreads.
constexpr int kTurn = 1;     // + warpgroup: it may issue its products
constexpr int kColumns = 3;  // + warpgroup: its columns are in shared memory

struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t texts_full;
  uint64_t texts_empty;
};

// Where everything is in shared memory. The same in all blocks of a cluster, which write into each other's ring.
struct Shared {
  uint8_t* texts;  // [steps][64 rows of 128 bytes]
  uint8_t* ring;   // [stages][width rows of 128 bytes, and without resident texts 64 more]
  float* columns;  // [2][kMaxWidth]
  Barriers* barriers;
  int stage_bytes;
};

template <int kWidth>
__device__ __forceinline__ Shared lay_out(const Work& work) {
  uint8_t* base = shared_memory();
  if (shared_address(base) & 1023) trap();  // the swizzle is a function of address bits 7 to 9
  Shared shared;
  shared.stage_bytes = kWidth * kStep * 2 + (work.resident ? 0 : kTextStepBytes);
  shared.texts = base;
  shared.ring = base + (work.resident ? work.steps * kTextStepBytes : 0);
  shared.columns = reinterpret_cast<float*>(shared.ring + work.stages * shared.stage_bytes);
  shared.barriers = reinterpret_cast<Barriers*>(shared.columns + 2 * kMaxWidth);
  return shared;
}

// Place and parity in the ring; the producer and both warpgroups count its steps alike.
struct Position {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next(int stages) {
    if (++slot == stages) slot = 0, parity ^= 1;
  }

  __device__ __forceinline__ void skip(int steps, int stages) {
    slot += steps;
    while (slot >= stages) slot -= stages, parity ^= 1;
  }
};

// Item `item` is 64 texts for each block against the groups [begin, end) of images. Texts change fastest: clusters that
// run together read the same patches.
struct Item {
  int64_t text, begin, end;
  int turns;  // tiles of each warpgroup; those of a group that is not there are computed and forgotten

  __device__ __forceinline__ Item(const Work& work, int64_t item, uint32_t block) {
    int64_t split = item / work.text_groups;
    text = ((item - split * work.text_groups) * work.cluster + block) * kTileTexts;
    begin = work.groups * split / work.splits;
    end = work.groups * (split + 1) / work.splits;
    turns = static_cast<int>((end - begin + 1) / 2) * work.chunks;
  }
};

template <int kWidth, bool kPooled>
__device__ __forceinline__ void produce(
    const Work& work, const Shared& shared, const TensorMap& patches, const TensorMap& texts, const TensorMap& gram,
    uint32_t block) {
  uint32_t patch_bytes = work.pitch * work.images_of_tile * kStep * 2;
  uint32_t bytes = patch_bytes + (work.resident ? 0 : kTextStepBytes);
  uint16_t everyone = static_cast<uint16_t>((1 << work.cluster) - 1);
  Barriers& barriers = *shared.barriers;
  Position at;
  uint32_t texts_parity = 1, loader = 0;  // of the cluster's blocks, the one that loads this step's patches
  for (int64_t i = blockIdx.x / work.cluster; i < work.items; i += work.clusters) {
    Item item(work, i, block);
    if (work.resident) {
      barrier_wait(&barriers.texts_empty, texts_parity);
      texts_parity ^= 1;
      barrier_arrive_expect(&barriers.texts_full, work.steps * kTextStepBytes);
      for (int step = 0; step < work.steps; ++step)
        load_box(shared.texts + step * kTextStepBytes, texts, &barriers.texts_full, step * kStep, item.text);
    }
    for (int turn = 0; turn < item.turns; ++turn) {
      int pair = turn / work.chunks, chunk = turn - pair * work.chunks;
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
        int image = static_cast<int>(item.begin + 2 * pair + warpgroup) * work.images_of_tile;
        for (int step = 0; step < work.steps; ++step) {
          uint8_t* slot = shared.ring + at.slot * shared.stage_bytes;
          uint64_t* full = &barriers.full[at.slot];
          barrier_wait(&barriers.empty[at.slot], at.parity ^ 1);
          barrier_arrive_expect(full, bytes);
          if (loader == block) load_box(slot, patches, full, step * kStep, chunk * kWidth, image, everyone);
          if (!work.resident) load_box(slot + kWidth * kStep * 2, texts, full, step * kStep, item.text);
          loader = loader + 1 == static_cast<uint32_t>(work.cluster) ? 0 : loader + 1;
          at.next(work.stages);
        }
      }
      if constexpr (kPooled) {
        for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
          int image = static_cast<int>(item.begin) + 2 * turn + warpgroup;
          for (int step = 0; step < work.gram_steps; ++step) {
            uint64_t* full = &barriers.full[at.slot];
            barrier_wait(&barriers.empty[at.slot], at.parity ^ 1);
            barrier_arrive_expect(full, kPooledRows<kWidth> * kStep * 2);
            constexpr int kSteps = (kWidth + kStep - 1) / kStep;
            if (loader == block)
              load_box(
                  shared.ring + at.slot * shared.stage_bytes, gram, full, step % kSteps * kStep,
                  step / kSteps * kPooledRows<kWidth>, image, everyone);
            loader = loader + 1 == static_cast<uint32_t>(work.cluster) ? 0 : loader + 1;
            at.next(work.stages);
          }
        }
      }
    }
  }
}

// Of a K-major operand in shared memory with a 128-byte swizzle: rows of 128 bytes, eight of them 1,024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* at) {
  uint64_t address = shared_address(at) >> 4;
  return address | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Each warp tells every block of the cluster that it is done with a step.
__device__ __forceinline__ void release(const Work& work, Barriers& barriers, int slot, int lane) {
  if (lane < work.cluster) barrier_arrive_at(&barriers.empty[slot], lane);
}

// Raw products of a tile, issued; all but the last step's are complete. Returns the slot of that one.
template <int kWidth, class T>
__device__ __forceinline__ int issue_products(
    const Work& work, const Shared& shared, Position& at, int lane, float (&acc)[kWidth / 2]) {
  int before = 0;
  for (int step = 0; step < work.steps; ++step) {
    const uint8_t* patches = shared.ring + at.slot * shared.stage_bytes;
    const uint8_t* texts = work.resident ? shared.texts + step * kTextStepBytes : patches + kWidth * kStep * 2;
    barrier_wait(&shared.barriers->full[at.slot], at.parity);
    uint64_t a = matrix_descriptor(texts), b = matrix_descriptor(patches);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)  // 16 elements are 32 bytes, and addresses count 16
      Wgmma<kWidth, T>::multiply(acc, a + 2 * k, b + 2 * k, step > 0 || k > 0);
    wgmma_commit();
    if (step > 0) {
      wgmma_wait<1>();
      release(work, *shared.barriers, before, lane);
    }
    before = at.slot;
    at.next(work.stages);
  }
  return before;
}

// q = G a of a tile (or its half), from the attention as the left operand; issued like the products.
template <int kWidth, int kPooled>
__device__ __forceinline__ int issue_pooling(
    const Work& work, const Shared& shared, Position& at, int lane, const uint32_t (&attention)[(kWidth + 15) / 16][4],
    float (&pooled)[kPooled / 2]) {
  constexpr int kAll = (kWidth + 15) / 16, kOfStep = kStep / 16;
  int before = 0;
  uint64_t b = 0;
#pragma unroll
  for (int k = 0; k < kAll; ++k) {
    if (k % kOfStep == 0) {
      barrier_wait(&shared.barriers->full[at.slot], at.parity);
      b = matrix_descriptor(shared.ring + at.slot * shared.stage_bytes);
      wgmma_fence();
    }
    Wgmma<kPooled, __half>::multiply(pooled, attention[k], b + 2 * (k % kOfStep), k > 0);
    if (k % kOfStep == kOfStep - 1 || k + 1 == kAll) {
      wgmma_commit();
      if (k >= kOfStep) {
        wgmma_wait<1>();
        release(work, *shared.barriers, before, lane);
      }
      before = at.slot;
      at.next(work.stages);
    }
  }
  return before;
}

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
    int count = inside ? min(8, work.patches - n) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      exchange_blocks(out[r], lane);
      if (count > 0 && rows.live[r])
        store_block(
            work.weights + rows.text[r] * work.stride_weights + of_image * work.patches + n, out[r], count,
            work.store_elements);
    }
  }
  return temperature_sum;
}

// Between the two products of the cosine form: the attention of the tile's rows, and what is known without pooling.
struct Pooling {
  float phi[2], lse[2];  // φ of `dot`, and the log-sum-exp in bits
};

template <int kWidth>
__device__ __forceinline__ Pooling attention_of(
    const Rows& rows, float (&acc)[kWidth / 2], const float* columns, float scale, int lane,
    uint32_t (&attention)[(kWidth + 15) / 16][4]) {
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, weighted[2] = {0.0f, 0.0f}, inverse[2];
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    float2 column = *reinterpret_cast<const float2*>(columns + 8 * j + 2 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float of_column = i % 2 ? column.y : column.x;
      float& x = acc[4 * j + i];
      x = of_column < 0.0f ? -INFINITY : x * of_column;  // whatever is behind a mask, NaN too
      most[i / 2] = fmaxf(most[i / 2], x);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    most[r] = most_of_four(most[r]);
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
  Pooling known;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float all = sum_of_four(total[r]), mean = sum_of_four(weighted[r]);
    bool empty = all == 0.0f;
    inverse[r] = empty ? 0.0f : 1.0f / all;
    known.phi[r] = mean * inverse[r] * rows.inverse[r];
    known.lse[r] = empty ? 0.0f : log2f(all) + most[r] * rows.inverse[r] * scale;
  }
#pragma unroll
  for (int k = 0; k < (kWidth + 15) / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int at = 8 * k + 2 * i, r = i % 2;  // rows `row` and `row + 8` of one block of eight columns, then of the next
      attention[k][i] =
          at < kWidth / 2 ? pack(acc[at] * inverse[r], acc[at + 1] * inverse[r], __half()) : 0;
    }
  return known;
}

// The second half of a tile of the cosine form, with a turn of its own: φ over the norm of the pooled patch,
// r² = aᵀ G a over (Σ a)², because the rounded attention does not sum to 1.
template <int kWidth>
__device__ __forceinline__ void pool(
    const Work& work, const Shared& shared, Position& at, const Rows& rows, float (&acc)[kWidth / 2],
    const float* columns, int64_t image, bool wanted, bool last_turn, float scale, int warpgroup, int lane) {
  constexpr int kPooled = kPooledRows<kWidth>;
  uint32_t attention[(kWidth + 15) / 16][4];
  wait_for_copies();
  named_sync(kColumns + warpgroup, kWarpgroup);
  Pooling known = attention_of<kWidth>(rows, acc, columns, scale, lane, attention);
  // In the registers of the scores, which are spent: with others the compiler runs out of them.
  float(&pooled)[kPooled / 2] = reinterpret_cast<float(&)[kPooled / 2]>(acc);
  float squared[2] = {0.0f, 0.0f}, total[2] = {0.0f, 0.0f};
  named_sync(kTurn + warpgroup, 2 * kWarpgroup);
#pragma unroll
  for (int first = 0; first < kWidth; first += kPooled) {
    int slot = issue_pooling<kWidth, kPooled>(work, shared, at, lane, attention, pooled);
    if (first + kPooled == kWidth) {
      at.skip(warpgroup == 0 ? work.gram_steps : work.steps, work.stages);
      if (warpgroup == 0 || !last_turn) named_arrive(kTurn + 1 - warpgroup, 2 * kWarpgroup);
    }
    wgmma_wait<0>();
    release(work, *shared.barriers, slot, lane);
#pragma unroll
    for (int i = 0; i < kPooled / 2; i += 2) {
      int of_tile = first / 2 + i, r = i / 2 % 2;
      float2 a = unpack(attention[of_tile / 8][of_tile / 2 % 4], __half());
      squared[r] = fmaf(a.x, pooled[i], fmaf(a.y, pooled[i + 1], squared[r]));
      total[r] += a.x + a.y;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float all = sum_of_four(total[r]), square = sum_of_four(squared[r]);
    float radius = sqrtf(square < 0.0f ? 0.0f : square) / (all == 0.0f ? 1.0f : all);  // NaN stays
    radius = radius < kLeastRadius ? kLeastRadius : radius;
    if (lane % 4 == 0 && wanted && rows.live[r] && image < work.images) {
      int64_t to = image * work.stride_phi + rows.text[r];
      work.phi[to] = known.phi[r] / radius;
      work.stat[to] = known.lse[r];
    }
  }
}

template <int kWidth, bool kPacked, class T, Epilogue kEpilogue>
__device__ __forceinline__ void consume(const Work& work, const Shared& shared, uint32_t block, int warpgroup) {
  constexpr bool kSafe = kEpilogue == Epilogue::forward_safe;
  int lane = threadIdx.x % 32, thread = threadIdx.x % kWarpgroup;
  float temperature = work.temperature_at ? *work.temperature_at : work.temperature;
  float inverse_temperature = 1.0f / temperature, scale = kLog2e * inverse_temperature;
  float* columns = shared.columns + warpgroup * kMaxWidth;
  Position at;
  if (warpgroup == 1) at.skip(work.steps, work.stages);
  uint32_t texts_parity = 0;
  constexpr bool kPooled = kEpilogue == Epilogue::cosine;
  Softmax<kSafe> softmax;
  Known known;
  double temperature_sum = 0.0;
  softmax.clear();
  if (warpgroup == 1) named_arrive(kTurn + 0, 2 * kWarpgroup);  // the first turn
  for (int64_t i = blockIdx.x / work.cluster; i < work.items; i += work.clusters) {
    Item item(work, i, block);
    bool last_item = i + work.clusters >= work.items;
    Rows rows(work, item.text + thread / 32 * 16 + lane / 4);
    if (work.resident) {
      barrier_wait(&shared.barriers->texts_full, texts_parity);
      texts_parity ^= 1;
    }
    for (int turn = 0; turn < item.turns; ++turn) {
      float acc[kWidth / 2];  // in here: of one tile, the compiler need not keep them for the next
      int pair = turn / work.chunks, chunk = turn - pair * work.chunks;
      int64_t group = item.begin + 2 * pair + warpgroup;
      bool wanted = group < item.end;
      int64_t image = group * work.images_of_tile;
      if constexpr (kEpilogue == Epilogue::weights) {
        if (wanted) known.load(work, rows, image);
      }
      named_sync(kTurn + warpgroup, 2 * kWarpgroup);
      if (wanted && thread < kWidth / 4)
        copy_16_bytes(columns + 4 * thread, work.columns + (group * work.chunks + chunk) * kWidth + 4 * thread);
      int last_slot = issue_products<kWidth, T>(work, shared, at, lane, acc);
      // Behind it come the other warpgroup's steps, and those of the Gram matrix of warpgroup 0.
      if constexpr (!kPooled) at.skip(work.steps, work.stages);
      if constexpr (kPooled) at.skip(warpgroup == 0 ? work.steps : work.gram_steps, work.stages);
      bool last_turn = last_item && turn + 1 == item.turns;
      if (warpgroup == 0 || kPooled || !last_turn) named_arrive(kTurn + 1 - warpgroup, 2 * kWarpgroup);
      wgmma_wait<0>();
      release(work, *shared.barriers, last_slot, lane);
      if (work.resident && turn + 1 == item.turns && lane == 0) barrier_arrive(&shared.barriers->texts_empty);
      if constexpr (kPooled) {
        pool<kWidth>(work, shared, at, rows, acc, columns, image, wanted, last_turn, scale, warpgroup, lane);
        continue;
      }
      if (!wanted) continue;
      wait_for_copies();
      named_sync(kColumns + warpgroup, kWarpgroup);
      if constexpr (kEpilogue == Epilogue::weights) {
        float sum = weights_epilogue<kWidth, kPacked, T>(
            work, rows, acc, columns, image, chunk, scale, inverse_temperature, lane, known);
        temperature_sum += sum;
      } else {
        forward_epilogue<kWidth, kPacked, kSafe>(
            work, rows, acc, columns, image, chunk + 1 == work.chunks, scale, lane, softmax);
      }
    }
  }
  if constexpr (kEpilogue == Epilogue::weights) {
    if (work.temperature_sums) {
      // The other warpgroup may still read its columns; its last turn is behind the barrier.
      float sum = static_cast<float>(temperature_sum);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      named_sync(kTurn, 2 * kWarpgroup);
      if (lane == 0) shared.columns[warpgroup * 4 + thread / 32] = sum;
      named_sync(kTurn, 2 * kWarpgroup);
      if (warpgroup == 0 && thread == 0) {
        float all = 0.0f;
        for (int warp = 0; warp < 8; ++warp) all += shared.columns[warp];
        work.temperature_sums[blockIdx.x] = all;
      }
    }
  }
}

template <int kWidth, bool kPacked, class T, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 1) score_kernel(
    const __grid_constant__ TensorMap patches, const __grid_constant__ TensorMap texts,
    const __grid_constant__ TensorMap gram, const __grid_constant__ Work work) {
  if constexpr (kEpilogue == Epilogue::forward || kEpilogue == Epilogue::forward_safe) {
    // A temperature on the device decides which of two launches works; the host does not wait to know.
    if (work.temperature_at && (*work.temperature_at < kPlainTemperature) != (kEpilogue == Epilogue::forward_safe))
      return;
  }
  Shared shared = lay_out<kWidth>(work);
  Barriers& barriers = *shared.barriers;
  uint32_t block = work.cluster > 1 ? block_of_cluster() : 0;
  int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be the same in a warp
  if (threadIdx.x == 0) {
    prefetch(patches);
    prefetch(texts);
#pragma unroll 1
    for (int stage = 0; stage < work.stages; ++stage) {
      barrier_init(&barriers.full[stage], 1);
      barrier_init(&barriers.empty[stage], 4 * work.cluster);  // the warps of the warpgroup whose tile it is
    }
    barrier_init(&barriers.texts_full, 1);
    barrier_init(&barriers.texts_empty, 8);
    fence_barrier_init();
  }
  __syncthreads();
  cluster_sync();  // before anyone writes into another's memory
  if (warp >= 8) {
    give_registers<40>();
    if (warp == 8 && threadIdx.x % 32 == 0) 
      produce<kWidth, kEpilogue == Epilogue::cosine>(work, shared, patches, texts, gram, block);
    __syncwarp();
  } else {
    take_registers<232>();
    consume<kWidth, kPacked, T, kEpilogue>(work, shared, block, warp / 4);
  }
  cluster_sync();  // nor leave while another writes into ours
}

__device__ __forceinline__ float column_of(const Columns& c, int64_t at) {
  int64_t tile = at / c.width;
  int column = static_cast<int>(at - tile * c.width);
  int64_t group = tile / c.chunks;
  int part = column / c.pitch;
  int64_t image = group * c.images_of_tile + part;
  int64_t n = (tile - group * c.chunks) * c.width + (column - part * c.pitch);
  if (part >= c.images_of_tile || image >= c.images || n >= c.patches) return kDeadColumn;
  if (c.mask && !c.mask[image * c.mask_stride_image + n * c.mask_stride_row]) return kDeadColumn;
  return c.inverse_norms[image * c.patches + n];
}

}  // namespace pacl::cuda
