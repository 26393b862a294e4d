// An emulator of csrc/cuda/ptx.cuh for the host, which runs the Hopper kernels' source without a GPU.
//
// Each thread of a cluster is a fiber, and the order in which fibers run is random. Asynchronous work (the copy engine,
// cp.async, wgmma) happens as late as the kernel's own waits allow, or at a random earlier time. A deadlock, a barrier
// that is counted wrongly and a read outside shared memory end the run with a message. The emulator knows what the
// instructions do, not what they cost, and nothing of the memory model beyond that.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
using std::min;

namespace emulator {

struct Index {
  unsigned x;
};
inline thread_local Index thread_index, block_index, block_size;

[[noreturn]] void fail(const std::string& what);
// Runs other fibers until `ready` holds. `what` names the wait in the message of a deadlock.
void wait_until(const std::function<bool()>& ready, const char* what);

struct Map {  // a tensor of 16-bit elements for the copy engine
  const uint8_t* base;
  int64_t sizes[3];    // innermost first
  int64_t strides[3];  // bytes; [0] is 2
  int box[3];
};

inline thread_local uint8_t* own_shared;  // shared memory of the running thread's block
inline thread_local uint32_t own_shared_bytes;
inline uint8_t* shared_base() { return own_shared; }
inline uint32_t shared_bytes() { return own_shared_bytes; }
uint32_t shuffle_xor(uint32_t value, int distance);
uint32_t shuffle(uint32_t value, int lane);
void named_barrier(int identity, int threads, bool wait);
void cluster_barrier();
unsigned cluster_rank();
void barrier_init(uint64_t* at, int arrivals);
void barrier_arrive(uint64_t* at, int block, int arrivals, int64_t bytes);  // block -1: the thread's own block
void barrier_wait(uint64_t* at, uint32_t parity);
void load_box(void* to, const Map& map, uint64_t* barrier, const int* corner, uint32_t blocks);
void store_box(const Map& map, const void* from, const int* corner);
void store_commit();
void store_wait_read();
void written(uint32_t offset);  // 16 bytes of shared memory, by this thread
void engine_fence();
void later(std::function<void()> action);  // runs `action` before this thread's wait for its copies ends
void finish_copies();
struct Product {
  void (*multiply)(const Product& self);
  float* d;
  uint64_t a;
  const uint32_t* a_registers;  // in place of `a`, or null
  uint64_t b;
  int accumulate;
};
void wgmma_issue(const Product& product);
void wgmma_commit();
void wgmma_wait(int in_flight);

inline float from_bits(uint16_t bits, __nv_bfloat16) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float from_bits(uint16_t bits, __half) { return std::bit_cast<_Float16>(bits); }
uint16_t to_bits(float x, __nv_bfloat16);
uint16_t to_bits(float x, __half);

// Runs `kernel` on `clusters` clusters of `cluster` blocks of `threads` threads.
void launch(int64_t clusters, int cluster, int threads, uint32_t shared_bytes, uint64_t seed,
            const std::function<void()>& kernel);

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size

inline float __shfl_xor_sync(uint32_t, float x, int distance) {
  uint32_t bits = emulator::shuffle_xor(std::bit_cast<uint32_t>(x), distance);
  return std::bit_cast<float>(bits);
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t x, int distance) { return emulator::shuffle_xor(x, distance); }
inline int __shfl_sync(uint32_t, int x, int lane) { return emulator::shuffle(x, lane); }
inline void __syncwarp() { emulator::shuffle(0, 0); }
inline void __syncthreads() { emulator::named_barrier(0, blockDim.x, true); }

namespace pacl::cuda {

using TensorMap = emulator::Map;

inline uint8_t* shared_memory() { return emulator::shared_base(); }

inline void trap() { emulator::fail("a trap"); }

inline uint32_t shared_address(const void* at) {
  int64_t offset = static_cast<const uint8_t*>(at) - emulator::shared_base();
  if (offset < 0 || offset > emulator::shared_bytes()) emulator::fail("an address outside of shared memory");
  return static_cast<uint32_t>(offset);
}

inline void barrier_init(uint64_t* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::barrier_arrive(barrier, -1, 1, bytes);
}
inline void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(barrier, -1, 1, 0); }
inline void barrier_arrive_at(uint64_t* barrier, uint32_t block) { emulator::barrier_arrive(barrier, block, 1, 0); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int x, int y) {
  int corner[] = {x, y, 0};
  emulator::load_box(to, map, barrier, corner, 1u << emulator::cluster_rank());
}
inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, int x, int y, int z, uint16_t blocks) {
  int corner[] = {x, y, z};
  emulator::load_box(to, map, barrier, corner, blocks);
}
inline void prefetch(const TensorMap&) {}
inline void store_box(const TensorMap& map, const void* from, int x, int y, int z) {
  int corner[] = {x, y, z};
  emulator::store_box(map, from, corner);
}
inline void store_commit() { emulator::store_commit(); }
inline void store_wait_read() { emulator::store_wait_read(); }
inline void engine_fence() { emulator::engine_fence(); }

inline void copy_16_bytes(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16) emulator::fail("cp.async is not aligned");
  emulator::later([to, from] { std::memcpy(to, from, 16); });
}
inline void wait_for_copies() { emulator::finish_copies(); }

inline void named_sync(int identity, int threads) { emulator::named_barrier(identity, threads, true); }
inline void named_arrive(int identity, int threads) { emulator::named_barrier(identity, threads, false); }
inline uint32_t block_of_cluster() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::cluster_barrier(); }
template <int>
void take_registers() {}
template <int>
void give_registers() {}

// Aligned instructions: no lane goes on before all lanes of its warp have arrived.
inline void wgmma_fence() { emulator::shuffle(0, 0); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kInFlight>
void wgmma_wait() {
  emulator::wgmma_wait(kInFlight);
  emulator::shuffle(0, 0);
}

// Reads elements [0, 16) of row `row` of the operand at a K-major descriptor with a 128-byte swizzle.
template <class T>
void operand_row(uint64_t descriptor, int row, float (&out)[16]) {
  uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = ((descriptor >> 32) & 0x3fff) << 4;
  for (int half = 0; half < 2; ++half) {
    uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + 16 * half;
    address ^= (address >> 7 & 7) << 4;
    if (address + 16 > emulator::shared_bytes()) emulator::fail("wgmma reads outside of shared memory");
    uint16_t bits[8];
    std::memcpy(bits, emulator::shared_base() + address, 16);
    for (int k = 0; k < 8; ++k) out[8 * half + k] = emulator::from_bits(bits[k], T());
  }
}

template <int kWidth, class T>
struct Wgmma {
  static void multiply(float (&d)[kWidth / 2], uint64_t a, uint64_t b, int accumulate) {
    if (a >> 62 != 1) emulator::fail("a matrix descriptor without the 128-byte swizzle");
    issue({compute, d, a, nullptr, b, accumulate});
  }

  // The registers are read when the product is computed, and must not change before.
  static void multiply(float (&d)[kWidth / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    issue({compute, d, 0, a, b, accumulate});
  }

 private:
  static void issue(const emulator::Product& product) {
    if (product.b >> 62 != 1) emulator::fail("a matrix descriptor without the 128-byte swizzle");
    emulator::wgmma_issue(product);
  }

  // Computes this thread's accumulators: rows `row` and `row + 8`, two neighbours of each eight columns.
  static void compute(const emulator::Product& product) {
    int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    float rows[2][16], column[16];
    if (product.a_registers) {
      gather(product.a_registers, lane, rows);
    } else {
      operand_row<T>(product.a, row, rows[0]);
      operand_row<T>(product.a, row + 8, rows[1]);
    }
    for (int j = 0; j < kWidth / 8; ++j)
      for (int c = 0; c < 2; ++c) {
        operand_row<T>(product.b, 8 * j + 2 * (lane % 4) + c, column);
        for (int r = 0; r < 2; ++r) {
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += rows[r][k] * column[k];
          float& out = product.d[4 * j + 2 * r + c];
          out = product.accumulate ? out + sum : sum;
        }
      }
  }

  // Gathers two rows of A from the registers of four lanes. Lane t has columns 2 t and 2 t + 1, and those eight
  // further.
  static void gather(const uint32_t* registers, int lane, float (&rows)[2][16]) {
    for (int i = 0; i < 4; ++i)
      for (int distance = 0; distance < 4; ++distance) {
        uint32_t both = emulator::shuffle_xor(registers[i], distance);
        int first = 8 * (i / 2) + 2 * (lane % 4 ^ distance);
        rows[i % 2][first] = emulator::from_bits(static_cast<uint16_t>(both), T());
        rows[i % 2][first + 1] = emulator::from_bits(static_cast<uint16_t>(both >> 16), T());
      }
  }
};

inline void store_matrices(void* row, const uint32_t (&v)[4]) {
  int lane = threadIdx.x % 32;
  if (shared_address(row) % 16) emulator::fail("stmatrix is not aligned");
  emulator::written(shared_address(row));
  for (int i = 0; i < 4; ++i) {
    uint32_t of_matrix = emulator::shuffle(shared_address(row), 8 * i + lane / 4);
    std::memcpy(emulator::shared_base() + of_matrix + 4 * (lane % 4), &v[i], 4);
  }
}

inline void store_matrices_transposed(void* column, const uint32_t (&v)[4]) {
  int lane = threadIdx.x % 32;
  if (shared_address(column) % 16) emulator::fail("stmatrix is not aligned");
  emulator::written(shared_address(column));
  for (int i = 0; i < 4; ++i)
    for (int c = 0; c < 2; ++c) {
      uint16_t element = static_cast<uint16_t>(v[i] >> 16 * c);
      uint32_t of_matrix = emulator::shuffle(shared_address(column), 8 * i + 2 * (lane % 4) + c);
      std::memcpy(emulator::shared_base() + of_matrix + 2 * (lane / 4), &element, 2);
    }
}

// Rounds the product before anything is added to it, even if the compiler fuses.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline uint32_t pack(float a, float b, __nv_bfloat16 type) {
  return emulator::to_bits(a, type) | uint32_t(emulator::to_bits(b, type)) << 16;
}
inline uint32_t pack(float a, float b, __half type) {
  return emulator::to_bits(a, type) | uint32_t(emulator::to_bits(b, type)) << 16;
}

inline float2 unpack(uint32_t both, __half type) {
  return {emulator::from_bits(static_cast<uint16_t>(both), type), emulator::from_bits(both >> 16, type)};
}

}  // namespace pacl::cuda
