// Instructions of sm_90 that CUDA C++ does not expose, one thin function each.
//
// tests/kernels/cuda/emulator.h defines the same names for the host, so that the kernels' source runs there without a
// GPU.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "wgmma.cuh"

namespace pacl::cuda {

using TensorMap = CUtensorMap;

// Returns the dynamic shared memory of the block.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ void trap() { __trap(); }

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// mbarrier: a phase ends when the expected number of arrivals and of bytes is reached.

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier in the shared memory of block `block` of the cluster. Its release covers this block
// alone, as in CUTLASS: it only tells the other block that the tensor cores have finished reading, and a release to the
// cluster would fence all memory.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }\n" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

// Waits until the phase of that parity has ended. The phase before the first counts as ended, with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// TMA: copies a box of a tensor to shared memory. Elements outside the tensor arrive as zeros and count as bytes.

__device__ __forceinline__ void load_box(void* to, const TensorMap& map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// Copies to the same address in each block of the bit mask `blocks`, and completes on the barrier of each.
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, uint64_t* barrier, int x, int y, int z,
                                         uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// Copies a box from shared memory to a tensor, asynchronously. Elements outside the tensor are left out. The thread's
// stores up to store_commit form a group.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to the copy engine, once the threads have met at a barrier.
__device__ __forceinline__ void engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies 16 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Named barriers of a block: `sync` waits until `threads` have arrived, `arrive` only counts. Identity 0 is
// __syncthreads.

__device__ __forceinline__ void named_sync(int identity, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(identity), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int identity, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(identity), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t block_of_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// take_registers and give_registers change the number of registers of each thread of the warpgroup.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma reads shared memory and writes its accumulators asynchronously, between commit and wait.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Stores four matrices of eight by eight 16-bit elements to shared memory, in rows of 16 bytes. Lanes 8 i to 8 i + 7
// pass the row addresses of matrix i. In `v[i]`, lane l passes two neighbours of row l / 4 of matrix i, at column
// 2 (l % 4).
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Stores the transposed matrices: lanes 8 i to 8 i + 7 pass the addresses of the columns of matrix i.
__device__ __forceinline__ void store_matrices_transposed(void* column, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(column)),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Packs two neighbours, the first into the low half.
__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
  __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
  __half2 both = __floats2half2_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&both);
}

__device__ __forceinline__ float2 unpack(uint32_t both, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

}  // namespace pacl::cuda
