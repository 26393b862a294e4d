// The data path to the tensor cores: the ring in shared memory, the producer, and the products of a tile.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef PACL_EMULATE
#include "emulator.h"
#else
#include "ptx.cuh"
#endif

#include "../constants.h"
#include "work.h"

namespace pacl::cuda {

constexpr int kWarpgroup = 128;
constexpr int threads_of(int consumers) { return (consumers + 1) * kWarpgroup; }  // + 1 for the producer's warpgroup

// Numbers of a block's named barriers; 0 belongs to __syncthreads.
constexpr int kTurn = 1;     // + warpgroup, which may issue its products
constexpr int kColumns = 4;  // + warpgroup, whose columns are in shared memory
constexpr int kFilled = 7;   // + warpgroup, whose box is filled

// The tensors that the copy engine reads and writes. A launch leaves out those that it does not use.
struct Maps {
  TensorMap patches, texts, gram, weights, attention;
};

struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t texts_full;
  uint64_t texts_empty;
};

// The layout of shared memory. It is the same in all blocks of a cluster, which write into each other's ring.
struct Shared {
  Barriers* barriers;
  float* columns;   // [consumers][kMaxWidth]
  uint8_t* staged;  // [4 consumers][kStagedBytes], one per warp, in kernels that write weights or attention
  double* sums;     // [consumers][kLossSums][32], in kernels with a sigmoid loss
  uint8_t* boxes;   // [consumers][kBoxes][64 box_columns elements], in kernels with bulk tensor stores
  uint8_t* texts;   // [steps][64 rows of 128 bytes]
  uint8_t* ring;    // [stages][width rows of 128 bytes, plus 64 rows if the texts are not resident]
  int stage_bytes;
};

template <int kWidth, Epilogue kEpilogue>
__device__ __forceinline__ Shared lay_out(const Work& work) {
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth);
  static_assert(sizeof(Barriers) <= kBarrierBytes);
  uint8_t* base = shared_memory();
  if (shared_address(base) & 1023) trap();  // the swizzle depends on address bits 7 to 9
  Shared shared;
  shared.barriers = reinterpret_cast<Barriers*>(base);
  shared.columns = reinterpret_cast<float*>(base + kBarrierBytes);
  shared.staged = base + kBarrierBytes + kConsumers * kMaxWidth * 4;
  shared.sums = reinterpret_cast<double*>(shared.staged + kConsumers * 4 * kStagedBytes);
  constexpr bool kStaged = is_staged(kEpilogue), kSummed = has_sigmoid_loss(kEpilogue);
  shared.boxes = base + fixed_bytes(kConsumers, kStaged, kSummed, false);
  shared.texts = base + fixed_bytes(kConsumers, kStaged, kSummed, is_transposed(kEpilogue));
  shared.ring = shared.texts + (work.resident ? work.steps * kTextStepBytes : 0);
  shared.stage_bytes = kWidth * kStep * 2 + (work.resident ? 0 : kTextStepBytes);
  return shared;
}

// A slot of the ring and its parity. The producer and all warpgroups count the steps in the same way.
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

// Item `item`: 64 texts per block against the groups [begin, end) of images. Texts change fastest, so that clusters
// that run at the same time read the same patches.
struct Item {
  int text, begin, end;
  int turns;  // tiles of each warpgroup; a tile past the last group is computed and discarded

  __device__ __forceinline__ Item(const Work& work, int64_t item, uint32_t block, int consumers) {
    uint32_t text_groups = static_cast<uint32_t>(work.text_groups);  // items are at most 64 times as many
    uint32_t split = static_cast<uint32_t>(item) / text_groups;
    text = static_cast<int>((static_cast<uint32_t>(item) - split * text_groups) * work.cluster + block) * kTileTexts;
    begin = begin_of(work, split);
    end = begin_of(work, split + 1);
    turns = (end - begin + consumers - 1) / consumers * work.chunks * work.passes;
  }

 private:
  // Returns groups * split / splits without a 64-bit division, which is a function call.
  static __device__ __forceinline__ int begin_of(const Work& work, uint32_t split) {
    uint32_t groups = static_cast<uint32_t>(work.groups), splits = static_cast<uint32_t>(work.splits);
    uint32_t whole = groups / splits, rest = groups - whole * splits;
    return static_cast<int>(whole * split + rest * split / splits);
  }
};

// A turn of an item: the set of groups (one per warpgroup), and the chunk of their images.
struct Turn {
  int set, chunk;
  bool again;  // in the second pass over the chunks

  __device__ __forceinline__ Turn(const Work& work, int turn) {
    int turns = work.chunks * work.passes;
    set = turn / turns;
    chunk = turn - set * turns;
    again = chunk >= work.chunks;
    if (again) chunk -= work.chunks;
  }
};

template <int kWidth, Epilogue kEpilogue>
__device__ __forceinline__ void produce(const Work& work, const Shared& shared, const Maps& maps, uint32_t block) {
  uint32_t patch_bytes = work.pitch * work.images_of_tile * kStep * 2;
  uint32_t bytes = patch_bytes + (work.resident ? 0 : kTextStepBytes);
  uint16_t everyone = static_cast<uint16_t>((1 << work.cluster) - 1);
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth);
  Barriers& barriers = *shared.barriers;
  Position at;
  uint32_t texts_parity = 1, loader = 0;  // loader: the block of the cluster that loads this step's patches
  for (int64_t i = blockIdx.x / work.cluster; i < work.items; i += work.clusters) {
    Item item(work, i, block, kConsumers);
    if (work.resident) {
      barrier_wait(&barriers.texts_empty, texts_parity);
      texts_parity ^= 1;
      barrier_arrive_expect(&barriers.texts_full, work.steps * kTextStepBytes);
      for (int step = 0; step < work.steps; ++step)
        load_box(shared.texts + step * kTextStepBytes, maps.texts, &barriers.texts_full, step * kStep, item.text);
    }
    for (int turn = 0; turn < item.turns; ++turn) {
      Turn now(work, turn);
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
        int image = (item.begin + kConsumers * now.set + warpgroup) * work.images_of_tile;
        int text = item.text;
        if constexpr (reads_attention(kEpilogue))
          text += image * static_cast<int>(work.texts);  // rows are ordered by image
#pragma unroll 1
        for (int step = 0; step < work.steps; ++step) {
          uint8_t* slot = shared.ring + at.slot * shared.stage_bytes;
          uint64_t* full = &barriers.full[at.slot];
          barrier_wait(&barriers.empty[at.slot], at.parity ^ 1);
          barrier_arrive_expect(full, bytes);
          if (loader == block) load_box(slot, maps.patches, full, step * kStep, now.chunk * kWidth, image, everyone);
          if (!work.resident) load_box(slot + kWidth * kStep * 2, maps.texts, full, step * kStep, text);
          loader = loader + 1 == static_cast<uint32_t>(work.cluster) ? 0 : loader + 1;
          at.next(work.stages);
        }
      }
      if constexpr (has_second_product(kEpilogue)) {
        for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
          int image = item.begin + kConsumers * turn + warpgroup;
          for (int step = 0; step < work.gram_steps; ++step) {
            uint64_t* full = &barriers.full[at.slot];
            barrier_wait(&barriers.empty[at.slot], at.parity ^ 1);
            barrier_arrive_expect(full, kWidth * kStep * 2);
            if (loader == block)
              load_box(shared.ring + at.slot * shared.stage_bytes, maps.gram, full, step * kStep, 0, image, everyone);
            loader = loader + 1 == static_cast<uint32_t>(work.cluster) ? 0 : loader + 1;
            at.next(work.stages);
          }
        }
      }
    }
  }
}

// Returns the descriptor of a K-major operand in shared memory with a 128-byte swizzle: eight rows are 1,024 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* at) {
  uint64_t address = shared_address(at) >> 4;
  return address | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Signals to every block of the cluster that this warp is done with a step.
__device__ __forceinline__ void release(const Work& work, Barriers& barriers, int slot, int lane) {
  if (lane < work.cluster) barrier_arrive_at(&barriers.empty[slot], lane);
}

// Issues the raw products of a tile. All but the last step are complete on return. Returns the slot of the last step.
template <int kWidth, class T>
__device__ __forceinline__ int issue_products(const Work& work, const Shared& shared, Position& at, int lane,
                                              float (&acc)[kWidth / 2]) {
  int before = 0;
  for (int step = 0; step < work.steps; ++step) {
    const uint8_t* patches = shared.ring + at.slot * shared.stage_bytes;
    const uint8_t* texts = work.resident ? shared.texts + step * kTextStepBytes : patches + kWidth * kStep * 2;
    barrier_wait(&shared.barriers->full[at.slot], at.parity);
    uint64_t a = matrix_descriptor(texts), b = matrix_descriptor(patches);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k)  // 16 elements are 32 bytes; addresses count units of 16 bytes
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

// Issues q = G a of a tile in the same way, with the attention as the left operand.
template <int kWidth>
__device__ __forceinline__ int issue_gram_attention(const Work& work, const Shared& shared, Position& at, int lane,
                                                    const uint32_t (&attention)[(kWidth + 15) / 16][4],
                                                    float (&gram_attention)[kWidth / 2]) {
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
    Wgmma<kWidth, __half>::multiply(gram_attention, attention[k], b + 2 * (k % kOfStep), k > 0);
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

}  // namespace pacl::cuda
