// What feeds the tensor cores: the ring in shared memory, the producer, and the products of a tile.

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
constexpr int threads_of(int consumers) { return (consumers + 1) * kWarpgroup; }  // the last has the producer

// Barriers of a block by number; 0 belongs to __syncthreads.
constexpr int kTurn = 1;     // + warpgroup: it may issue its products
constexpr int kColumns = 4;  // + warpgroup: its columns are in shared memory

struct Barriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t texts_full;
  uint64_t texts_empty;
};

// Where everything is in shared memory. The same in all blocks of a cluster, which write into each other's ring.
struct Shared {
  Barriers* barriers;
  float* columns;   // [consumers][kMaxWidth]
  uint8_t* staged;  // [4 consumers][kStagedBytes], a part for each warp, in kernels that write weights or attention
  uint8_t* texts;   // [steps][64 rows of 128 bytes]
  uint8_t* ring;    // [stages][width rows of 128 bytes, and without resident texts 64 more]
  int stage_bytes;
};

template <int kWidth, Epilogue kEpilogue>
__device__ __forceinline__ Shared lay_out(const Work& work) {
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth);
  static_assert(sizeof(Barriers) <= kBarrierBytes);
  uint8_t* base = shared_memory();
  if (shared_address(base) & 1023) trap();  // the swizzle is a function of address bits 7 to 9
  Shared shared;
  shared.barriers = reinterpret_cast<Barriers*>(base);
  shared.columns = reinterpret_cast<float*>(base + kBarrierBytes);
  shared.staged = base + kBarrierBytes + kConsumers * kMaxWidth * 4;
  shared.texts = base + fixed_bytes(kConsumers, is_staged(kEpilogue));
  shared.ring = shared.texts + (work.resident ? work.steps * kTextStepBytes : 0);
  shared.stage_bytes = kWidth * kStep * 2 + (work.resident ? 0 : kTextStepBytes);
  return shared;
}

// Place and parity in the ring; the producer and all warpgroups count its steps alike.
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
  int text, begin, end;
  int turns;  // tiles of each warpgroup; those of a group that is not there are computed and forgotten

  __device__ __forceinline__ Item(const Work& work, int64_t item, uint32_t block, int consumers) {
    uint32_t text_groups = static_cast<uint32_t>(work.text_groups);  // items are at most 64 times as many
    uint32_t split = static_cast<uint32_t>(item) / text_groups;
    text = static_cast<int>((static_cast<uint32_t>(item) - split * text_groups) * work.cluster + block) * kTileTexts;
    begin = begin_of(work, split);
    end = begin_of(work, split + 1);
    turns = (end - begin + consumers - 1) / consumers * work.chunks * work.passes;
  }

 private:
  // groups split / splits without a division of 64 bits, which is a call.
  static __device__ __forceinline__ int begin_of(const Work& work, uint32_t split) {
    uint32_t groups = static_cast<uint32_t>(work.groups), splits = static_cast<uint32_t>(work.splits);
    uint32_t whole = groups / splits, rest = groups - whole * splits;
    return static_cast<int>(whole * split + rest * split / splits);
  }
};

// Of an item's turns: which set of groups, a group for each warpgroup, and the chunk of their images.
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
__device__ __forceinline__ void produce(const Work& work, const Shared& shared, const TensorMap& patches,
                                        const TensorMap& texts, const TensorMap& gram, uint32_t block) {
  uint32_t patch_bytes = work.pitch * work.images_of_tile * kStep * 2;
  uint32_t bytes = patch_bytes + (work.resident ? 0 : kTextStepBytes);
  uint16_t everyone = static_cast<uint16_t>((1 << work.cluster) - 1);
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth);
  Barriers& barriers = *shared.barriers;
  Position at;
  uint32_t texts_parity = 1, loader = 0;  // of the cluster's blocks, the one that loads this step's patches
  for (int64_t i = blockIdx.x / work.cluster; i < work.items; i += work.clusters) {
    Item item(work, i, block, kConsumers);
    if (work.resident) {
      barrier_wait(&barriers.texts_empty, texts_parity);
      texts_parity ^= 1;
      barrier_arrive_expect(&barriers.texts_full, work.steps * kTextStepBytes);
      for (int step = 0; step < work.steps; ++step)
        load_box(shared.texts + step * kTextStepBytes, texts, &barriers.texts_full, step * kStep, item.text);
    }
    for (int turn = 0; turn < item.turns; ++turn) {
      Turn now(work, turn);
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < kConsumers; ++warpgroup) {
        int image = (item.begin + kConsumers * now.set + warpgroup) * work.images_of_tile;
        int text = item.text;
        if constexpr (reads_attention(kEpilogue)) text += image * static_cast<int>(work.texts);  // rows by image
#pragma unroll 1
        for (int step = 0; step < work.steps; ++step) {
          uint8_t* slot = shared.ring + at.slot * shared.stage_bytes;
          uint64_t* full = &barriers.full[at.slot];
          barrier_wait(&barriers.empty[at.slot], at.parity ^ 1);
          barrier_arrive_expect(full, bytes);
          if (loader == block) load_box(slot, patches, full, step * kStep, now.chunk * kWidth, image, everyone);
          if (!work.resident) load_box(slot + kWidth * kStep * 2, texts, full, step * kStep, text);
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
              load_box(shared.ring + at.slot * shared.stage_bytes, gram, full, step * kStep, 0, image, everyone);
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

// q = G a of a tile, from the attention as the left operand; issued like the products.
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
