// The matrix unit of processors with AMX: 8 tiles of 16 rows of 64 bytes. One instruction adds the product of two tiles
// of bfloat16 pairs to a third, 16 x 16 sums of 32 products, in 16 cycles. The panels of product.h are its operands.
// PACL_EMULATE_AMX computes the same in plain loops, so that tests run anywhere and sanitizers see every access.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(PACL_EMULATE_AMX)
#define PACL_MATRIX_UNIT

namespace {

constexpr int kMatrixRows = 16, kMatrixUnits = 16;  // size of a tile; a unit is 4 bytes

#if defined(PACL_EMULATE_AMX)

thread_local uint32_t matrix_tiles[8][kMatrixRows][kMatrixUnits];
thread_local bool matrix_open = false;

struct MatrixUnit {
  MatrixUnit() {
    if (matrix_open) __builtin_trap();
    matrix_open = true;
    memset(matrix_tiles, 0, sizeof matrix_tiles);
  }
  ~MatrixUnit() { matrix_open = false; }
};

template <int kTile>
inline void matrix_zero() {
  memset(matrix_tiles[kTile], 0, sizeof matrix_tiles[kTile]);
}
template <int kTile>
inline void matrix_load(const float* from, int64_t stride) {
  if (!matrix_open) __builtin_trap();
  for (int i = 0; i < kMatrixRows; ++i)
    for (int j = 0; j < kMatrixUnits; ++j) memcpy(&matrix_tiles[kTile][i][j], from + i * stride + j, 4);
}
template <int kTile>
inline void matrix_stream(const float* from, int64_t stride) {
  matrix_load<kTile>(from, stride);
}
template <int kTile>
inline void matrix_store(float* to, int64_t stride) {
  for (int i = 0; i < kMatrixRows; ++i)
    for (int j = 0; j < kMatrixUnits; ++j) memcpy(to + i * stride + j, &matrix_tiles[kTile][i][j], 4);
}
template <int kSum, int kLeft, int kRight>
inline void matrix_multiply_add() {
  const auto half = [](uint32_t unit, int odd) {
    const uint32_t i = odd ? unit & 0xFFFF0000u : unit << 16;
    float f;
    memcpy(&f, &i, sizeof f);
    return f;
  };
  if (!matrix_open) __builtin_trap();
  for (int i = 0; i < kMatrixRows; ++i)
    for (int j = 0; j < kMatrixUnits; ++j) {
      float sum;
      memcpy(&sum, &matrix_tiles[kSum][i][j], sizeof sum);
      for (int k = 0; k < kMatrixUnits; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sum += half(matrix_tiles[kLeft][i][k], odd) * half(matrix_tiles[kRight][k][j], odd);
      memcpy(&matrix_tiles[kSum][i][j], &sum, sizeof sum);
    }
}

#else

// Lets this thread use the tiles during its lifetime. The destructor releases them; otherwise the operating system
// would save 8 KiB at every context switch.
struct MatrixUnit {
  MatrixUnit() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14]{};
      uint16_t row_bytes[16]{};
      uint8_t rows[16]{};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 4 * kMatrixUnits;
      shape.rows[i] = kMatrixRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
};

// Written in assembly, because GCC's intrinsics do not tell the compiler that they access memory. Strides are in units.
template <int kTile>
inline void matrix_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void matrix_load(const float* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void matrix_stream(const float* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void matrix_store(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kSum, int kLeft, int kRight>
inline void matrix_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

// A tile of 16 kTall rows and 32 columns of c = (c +) left right + ...: matrix_begin, any number of matrix_add, then
// matrix_end. matrix_stream loads with a streaming hint (tileloaddt1): each left tile is used once per right panel and
// should not evict other lines from the L1 cache.
template <int kTall>
inline void matrix_begin(const float* c, bool add) {
  static_assert(kLanes == kMatrixUnits);
  constexpr int64_t kHalf = kMatrixUnits, kBelow = kMatrixRows * kPanel;
  if (add) {
    matrix_load<0>(c, kPanel);
    matrix_load<1>(c + kHalf, kPanel);
    if constexpr (kTall == 2) {
      matrix_load<2>(c + kBelow, kPanel);
      matrix_load<3>(c + kBelow + kHalf, kPanel);
    }
  } else {
    matrix_zero<0>();
    matrix_zero<1>();
    if constexpr (kTall == 2) {
      matrix_zero<2>();
      matrix_zero<3>();
    }
  }
}

// Adds a product over `inner` units, a multiple of 16. Panels are as in `tile`, except that rows of the left operand
// are `left_row` apart. aside() is called once per 16 units.
template <int kTall, class Aside>
inline void matrix_add(const float* left, int64_t left_row, int64_t left_block, const float* right, int64_t inner,
                       Aside aside) {
  constexpr int64_t kHalf = kMatrixUnits;
  for (int64_t j = 0; j < inner; j += kMatrixUnits, right += kMatrixUnits * kPanel) {
    const float* block = left + j / kPanel * left_block + j % kPanel;
    matrix_stream<4>(block, left_row);
    matrix_load<6>(right, kPanel);
    aside();
    matrix_multiply_add<0, 4, 6>();
    matrix_load<7>(right + kHalf, kPanel);
    matrix_multiply_add<1, 4, 7>();
    if constexpr (kTall == 2) {
      matrix_stream<5>(block + kMatrixRows * left_row, left_row);
      matrix_multiply_add<2, 5, 6>();
      matrix_multiply_add<3, 5, 7>();
    }
  }
}

template <int kTall>
inline void matrix_end(float* c) {
  constexpr int64_t kHalf = kMatrixUnits, kBelow = kMatrixRows * kPanel;
  matrix_store<0>(c, kPanel);
  matrix_store<1>(c + kHalf, kPanel);
  if constexpr (kTall == 2) {
    matrix_store<2>(c + kBelow, kPanel);
    matrix_store<3>(c + kBelow + kHalf, kPanel);
  }
}

template <int kTall, class Aside>
inline void matrix_tile(const float* left, int64_t left_block, const float* right, float* c, int64_t inner, bool add,
                        Aside aside) {
  matrix_begin<kTall>(c, add);
  matrix_add<kTall>(left, kPanel, left_block, right, inner, aside);
  matrix_end<kTall>(c);
}

}  // namespace
#endif
