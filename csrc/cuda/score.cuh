// The kernel: the score product with its epilogues, warp-specialised for Hopper.
//
// A block works on 64 texts, which stay in shared memory if they fit, and walks through images. One warp feeds a ring
// of steps (64 dimensions of the patches of a tile) through the copy engine. Two or three warpgroups take tiles in
// turn, so that the epilogues of some run while the tensor cores work for another. Texts are the rows of a tile and
// patches its columns. A softmax over patches thus runs along each thread's own accumulators, and since |s| <= 1 it is
// two plain sums. The two blocks of a cluster hold different texts and share every step of patches: each loads half of
// the steps into both.
//
// docs/cuda.md has a diagram. plan.h chooses the tile and distributes the work.

#pragma once

#include "sigmoid.cuh"

namespace pacl::cuda {

// Values that a thread keeps in registers from one tile to the next.
template <Epilogue kEpilogue>
struct Carry {
  Softmax<kEpilogue == Epilogue::dot_forward_running_max> softmax;
  Moments moments;
  DotResult dot;
  Known known;
  double temperature_sum = 0.0;

  __device__ __forceinline__ Carry() { softmax.clear(); }
};

// Runs the epilogue of a tile. `acc` has the scores, or q = G a if `attention` has a.
template <int kWidth, bool kPacked, class T, Epilogue kEpilogue, class Out, class Attention>
__device__ __forceinline__ void finish_tile(const Tile& tile, Out& outlet, const Turn& now,
                                            const float (&acc)[kWidth / 2], Attention& attention,
                                            Carry<kEpilogue>& carry, LossSums& sums) {
  constexpr bool kRead = reads_attention(kEpilogue);
  constexpr Epilogue kArithmetic = arithmetic_of(kEpilogue);
  const Work& work = tile.work;
  bool last = now.chunk + 1 == work.chunks;
  bool exact = tile.inverse_temperature > 1.0f / kExactBelow;  // use the rounded s - φ
  Known& known = carry.known;
  if constexpr (kEpilogue == Epilogue::dot_forward || kEpilogue == Epilogue::dot_forward_running_max) {
    dot_forward_epilogue<kWidth, kPacked>(tile, acc, last, carry.softmax);
  } else if constexpr (kEpilogue == Epilogue::attention) {
    if (exact)
      attention_epilogue<kWidth, kPacked, true>(tile, outlet, acc, known);
    else
      attention_epilogue<kWidth, kPacked, false>(tile, outlet, acc, known);
  } else if constexpr (kArithmetic == Epilogue::dot_weights) {
    if (work.full || exact)
      carry.temperature_sum += dot_weights_epilogue<kWidth, kPacked, true, T>(tile, outlet, acc, known);
    else
      dot_weights_epilogue<kWidth, kPacked, false, T>(tile, outlet, acc, known);
  } else if constexpr (kEpilogue == Epilogue::dot_sigmoid_weights) {
    // The full variant has a running maximum, which a small temperature needs.
    if (work.full || tile.inverse_temperature > 1.0f / kRunningMaxBelow)
      dot_sigmoid_epilogue<kWidth, true, T>(tile, outlet, acc, sums);
    else
      dot_sigmoid_epilogue<kWidth, false, T>(tile, outlet, acc, sums);
  } else if constexpr (kEpilogue == Epilogue::cosine_sigmoid_weights) {
    if (work.full)
      cosine_sigmoid_epilogue<kWidth, true, T>(tile, outlet, attention, acc, carry.dot, sums);
    else
      cosine_sigmoid_epilogue<kWidth, false, T>(tile, outlet, attention, acc, carry.dot, sums);
  } else if constexpr (!writes_weights(kEpilogue)) {
    if (!kRead || now.chunk == 0) carry.moments.clear();
    carry.moments.template add<kWidth, false>(attention, acc);
    if (kRead && !last) return;
    if constexpr (kRead) carry.dot = dot_result_of(tile);
    cosine_forward_epilogue(tile, carry.dot, carry.moments);
  } else {
    if (!kRead || !now.again) {
      if (!kRead || now.chunk == 0) carry.moments.clear();
      carry.moments.template add<kWidth, true>(attention, acc);
    }
    if (kRead && work.passes == 2 && !now.again) return;
    if constexpr (kRead) {
      known.load(known.state, work.state, work, tile.rows, tile.image);
      known.load(known.grad, work.grad_phi, work, tile.rows, tile.image);
    }
    if (work.full)
      carry.temperature_sum +=
          cosine_weights_epilogue<kWidth, true, !kRead, T>(tile, outlet, attention, acc, carry.moments, known);
    else
      cosine_weights_epilogue<kWidth, false, !kRead, T>(tile, outlet, attention, acc, carry.moments, known);
  }
}

// Stores the block's part of the temperature's gradient, the sum over all threads of its warpgroups.
template <int kConsumers>
__device__ __forceinline__ void store_temperature_sum(const Work& work, const Shared& shared, double of_thread,
                                                      int warpgroup, int lane) {
  int thread = threadIdx.x % kWarpgroup;
  float sum = static_cast<float>(of_thread);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  named_sync(kTurn, kConsumers * kWarpgroup);  // waits until all warpgroups have taken their last turn and read columns
  if (lane == 0) shared.columns[warpgroup * 4 + thread / 32] = sum;
  named_sync(kTurn, kConsumers * kWarpgroup);
  if (warpgroup == 0 && thread == 0) {
    float all = 0.0f;
    for (int warp = 0; warp < 4 * kConsumers; ++warp) all += shared.columns[warp];
    work.temperature_sums[blockIdx.x] = all;
  }
}

// Stores the block's sums of a sigmoid loss.
template <int kConsumers>
__device__ __forceinline__ void store_loss_sums(const Work& work, const Shared& shared, int warpgroup, int lane) {
  named_sync(kTurn, kConsumers * kWarpgroup);
  if (warpgroup != 0) return;
  int which = threadIdx.x / 32;  // a warp for each sum
  double of_lane = 0.0;
  for (int from = 0; from < kConsumers; ++from) of_lane += shared.sums[(from * kLossSums + which) * 32 + lane];
  float sum = static_cast<float>(of_lane);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0) work.loss_sums[blockIdx.x * kLossSums + which] = sum;
}

template <int kWidth, bool kPacked, class T, Epilogue kEpilogue>
__device__ __forceinline__ void consume(const Work& work, const Shared& shared, const Maps& maps, uint32_t block,
                                        int warpgroup) {
  int lane = threadIdx.x % 32, thread = threadIdx.x % kWarpgroup;
  float temperature = work.temperature_at ? *work.temperature_at : work.temperature;
  float inverse_temperature = 1.0f / temperature, scale = kLog2e * inverse_temperature;
  float* columns = shared.columns + warpgroup * kMaxWidth;
  Position at;
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth), kLast = kConsumers - 1;
  at.skip(warpgroup * work.steps, work.stages);
  const int next = warpgroup == kLast ? 0 : warpgroup + 1;  // the warpgroup with the next turn
  uint32_t texts_parity = 0;
  constexpr bool kSecondProduct = has_second_product(kEpilogue), kRead = reads_attention(kEpilogue);
  constexpr bool kBoxed = is_transposed(kEpilogue);
  constexpr Epilogue kArithmetic = arithmetic_of(kEpilogue);
  using Operand = std::conditional_t<kRead, __half, T>;
  Carry<kEpilogue> carry;
  uint8_t* staged = shared.staged + (warpgroup * 4 + thread / 32) * kStagedBytes;
  LossSums sums{shared.sums + warpgroup * kLossSums * 32 + thread / 4, lane};
  if constexpr (has_sigmoid_loss(kEpilogue)) sums.clear();
  if (warpgroup == kLast) named_arrive(kTurn + next, 2 * kWarpgroup);  // the first turn
  const uint32_t items = static_cast<uint32_t>(work.items), clusters = static_cast<uint32_t>(work.clusters);
  for (uint32_t i = blockIdx.x / work.cluster; i < items; i += clusters) {
    Item item(work, i, block, kConsumers);
    bool last_item = i + clusters >= items;
    Rows rows(work, item.text + thread / 32 * 16 + lane / 4);
    if (work.resident) {
      barrier_wait(&shared.barriers->texts_full, texts_parity);
      texts_parity ^= 1;
    }
    for (int turn = 0; turn < item.turns; ++turn) {
      float acc[kWidth / 2];  // declared per tile, so that the compiler need not keep it for the next one
      Turn now(work, turn);
      int chunk = now.chunk, group = item.begin + kConsumers * now.set + warpgroup;
      bool wanted = group < item.end;
      int image = group * work.images_of_tile;
      if constexpr (kArithmetic == Epilogue::dot_weights || kEpilogue == Epilogue::attention) {
        if (wanted) carry.known.load(work, rows, image);
      } else if constexpr (kArithmetic == Epilogue::cosine_weights) {
        // The cosine form needs the other values later, and has no registers to spare.
        if (wanted) carry.known.load(carry.known.state, work.state, work, rows, image);
      }
      named_sync(kTurn + warpgroup, 2 * kWarpgroup);
      if (kEpilogue != Epilogue::cosine_forward_from_attention && wanted && thread < kWidth / 4)
        copy_16_bytes(columns + 4 * thread,
                      work.columns + (int64_t(group) * work.chunks + chunk) * kWidth + 4 * thread);
      int last_slot = issue_products<kWidth, Operand>(work, shared, at, lane, acc);
      // Skip the other warpgroups' steps, and those of the Gram matrix of warpgroup 0.
      if constexpr (!kSecondProduct) at.skip((kConsumers - 1) * work.steps, work.stages);
      if constexpr (kSecondProduct) at.skip(warpgroup == 0 ? work.steps : work.gram_steps, work.stages);
      bool last_turn = last_item && turn + 1 == item.turns;
      if (warpgroup != kLast || kSecondProduct || !last_turn) named_arrive(kTurn + next, 2 * kWarpgroup);
      uint32_t attention[kSecondProduct || kRead ? (kWidth + 15) / 16 : 1][4];
      if constexpr (kRead) {
        if (wanted) load_attention<kWidth>(work, rows, image, chunk * kWidth, lane, attention);
      }
      wgmma_wait<0>();
      release(work, *shared.barriers, last_slot, lane);
      if (work.resident && turn + 1 == item.turns && lane == 0) barrier_arrive(&shared.barriers->texts_empty);
      if (wanted) {
        wait_for_copies();
        if (kBoxed && thread == 0) store_wait_read();  // behind the barrier all boxes are free
        named_sync(kColumns + warpgroup, kWarpgroup);
      }
      if constexpr (kSecondProduct) {
        if constexpr (kArithmetic != Epilogue::cosine_weights)
          carry.dot = attention_of<kWidth>(rows, acc, columns, scale, lane, attention);
        else
          attention_again<kWidth>(rows, carry.known, acc, columns, scale, lane, attention);
        named_sync(kTurn + warpgroup, 2 * kWarpgroup);  // the second turn of the tile
        // Reuse the registers of the scores, which are no longer needed; separate ones would spill.
        int slot = issue_gram_attention<kWidth>(work, shared, at, lane, attention, acc);
        at.skip(warpgroup == 0 ? work.gram_steps : work.steps, work.stages);
        if (warpgroup != kLast || !last_turn) named_arrive(kTurn + next, 2 * kWarpgroup);
        if constexpr (kArithmetic == Epilogue::cosine_weights) {
          if (wanted) carry.known.load(carry.known.grad, work.grad_phi, work, rows, image);
        }
        wgmma_wait<0>();
        release(work, *shared.barriers, slot, lane);
      }
      Tile tile{.work = work,
                .rows = rows,
                .columns = columns,
                .image = image,
                .chunk = kSecondProduct ? 0 : chunk,  // an image is one tile
                .scale = scale,
                .inverse_temperature = inverse_temperature,
                .lane = lane};
      if constexpr (kBoxed) {
        using Out = Boxes<box_columns(kConsumers)>;
        uint8_t* boxes = shared.boxes + warpgroup * kBoxes * Out::kBytes;
        Out outlet{maps.weights, maps.attention, boxes, item.text, thread / 32, lane, kFilled + warpgroup};
        if (wanted) finish_tile<kWidth, kPacked, T, kEpilogue>(tile, outlet, now, acc, attention, carry, sums);
      } else {
        // Without weights no row is stored: the sums of a sigmoid loss are all that is wanted, or the time without
        // them.
        bool stored = !writes_weights(kEpilogue) || work.weights;
        Outlet outlet{staged, item.text + thread / 32 * 16, stored ? static_cast<int>(work.texts) : 0, lane};
        if (wanted) finish_tile<kWidth, kPacked, T, kEpilogue>(tile, outlet, now, acc, attention, carry, sums);
      }
    }
  }
  if (kBoxed && thread == 0) store_wait_read();  // shared memory must outlive the stores
  if constexpr (has_sigmoid_loss(kEpilogue)) {
    store_loss_sums<kConsumers>(work, shared, warpgroup, lane);
  } else if constexpr (writes_weights(kEpilogue)) {
    if (work.temperature_sums) store_temperature_sum<kConsumers>(work, shared, carry.temperature_sum, warpgroup, lane);
  }
}

template <int kWidth, bool kPacked, class T, Epilogue kEpilogue>
__global__ void __launch_bounds__(threads_of(consumers_of(kEpilogue, kWidth)), 1)
    score_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Work work) {
  constexpr bool kRunningMax = kEpilogue == Epilogue::dot_forward_running_max;
  if constexpr (kEpilogue == Epilogue::dot_forward || kRunningMax) {
    // A temperature on the device decides which of two launches runs, so that the host need not read it.
    if (work.temperature_at && (*work.temperature_at < kRunningMaxBelow) != kRunningMax) return;
  }
  constexpr int kConsumers = consumers_of(kEpilogue, kWidth);
  Shared shared = lay_out<kWidth, kEpilogue>(work);
  Barriers& barriers = *shared.barriers;
  uint32_t block = work.cluster > 1 ? block_of_cluster() : 0;
  // The shuffle shows the compiler that a warp has one value.
  int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    prefetch(maps.patches);
    prefetch(maps.texts);
#pragma unroll 1
    for (int stage = 0; stage < work.stages; ++stage) {
      barrier_init(&barriers.full[stage], 1);
      barrier_init(&barriers.empty[stage], 4 * work.cluster);  // the warps of the warpgroup that owns the tile
    }
    barrier_init(&barriers.texts_full, 1);
    barrier_init(&barriers.texts_empty, 4 * kConsumers);
    fence_barrier_init();
  }
  __syncthreads();
  cluster_sync();  // before any block writes into another's memory
  if (warp >= 4 * kConsumers) {
    give_registers<kConsumers == 3 ? 32 : 40>();
    if (warp == 4 * kConsumers && threadIdx.x % 32 == 0) produce<kWidth, kEpilogue>(work, shared, maps, block);
    __syncwarp();
  } else {
    take_registers<kConsumers == 3 ? 160 : 232>();
    consume<kWidth, kPacked, T, kEpilogue>(work, shared, maps, block, warp / 4);
  }
  cluster_sync();  // stay until no other block writes into ours
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
