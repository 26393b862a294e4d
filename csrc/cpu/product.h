// The register-tiled matrix product on which all kernels build, and the prefetching of its operands.
#pragma once

#include "patches.h"
#include "units.h"

namespace {

using namespace pacl;

// Returns the image that holds row `row`, which is below row_start[images].
inline int64_t image_of_row(const CompatibilityParams& p, const int64_t* row_start, int64_t row) {
  return last_at_most(row_start, p.images, row);
}

// Computes one tile of kRows x kPanel sums in registers: c (+)= left right over `inner` units (a multiple of 4).
// Left element (i, j) is left[i * kI + j * kJ] within a block of kPanel units; blocks are left_block apart.
template <class Op, int kRows, int kI, int kJ>
__attribute__((noinline)) void tile(const float* left, int64_t left_block, const float* right, float* c, int64_t inner,
                                    bool add) {
  V sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = V{};
  for (; inner > 0; inner -= kPanel, left += left_block) {
    const int64_t steps = least(inner, kPanel);
    for (int64_t j = 0; j < steps; j += 4) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step, right += kPanel) {
        const V right0 = load(right), right1 = load(right + kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const V x = Op::broadcast_unit(left + i * kI + (j + step) * kJ);
          sum[i][0] = Op::multiply_add(sum[i][0], x, right0);
          sum[i][1] = Op::multiply_add(sum[i][1], x, right1);
        }
      }
    }
  }
  // Add c at the end, not at the start: a long sum is then a sum of short ones, whose rounding errors stay small.
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] += load(c + i * kPanel);
      sum[i][1] += load(c + i * kPanel + kLanes);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(c + i * kPanel, sum[i][0]);
    store(c + i * kPanel + kLanes, sum[i][1]);
  }
}

// A prefetch of memory that is needed soon, a few cache lines at a time between tiles: `rows` pieces of `row_bytes`,
// `stride` bytes apart. It is a hint, so a wrong address does no harm.
struct Ahead {
  const char* at = nullptr;
  int64_t rows = 0, row_bytes = 0, stride = 0, lines_per_step = 0, byte = 0;

  Ahead() = default;
  Ahead(const void* from, int64_t count, int64_t bytes, int64_t bytes_apart, int64_t steps)
      : at((const char*)from),
        rows(count),
        row_bytes(bytes),
        stride(bytes_apart),
        lines_per_step(ceil_div(count * ceil_div(bytes, 64), most(1, steps))) {}
  void step() { fetch(lines_per_step); }
  void fetch(int64_t lines) {
    for (int64_t line = 0; line < lines && rows > 0; ++line) {
      __builtin_prefetch(at + byte, 0, 2);
      byte += 64;
      if (byte < row_bytes) continue;
      byte = 0;
      at += stride;
      --rows;
    }
  }
};

// Returns true if the caller's rows are contiguous and evenly spaced across all images.
inline bool rows_are_even(const CompatibilityParams& p) {
  return p.patch_strides.dim == 1 &&
         (p.patch_starts || p.patch_strides.image == p.patches_per_image * p.patch_strides.row);
}

// Returns the prefetch of rows [row, row + count) of the call in the caller's tensor, as if no patch were masked.
Ahead ahead_of_rows(const CompatibilityParams& p, const int64_t* row_start, int64_t row, int64_t count, int64_t steps) {
  if (row < 0 || row >= row_start[p.images] || !rows_are_even(p)) return {};
  const int64_t image = image_of_row(p, row_start, row), bytes = p.dtype == Dtype::float32 ? 4 : 2;
  const int64_t first = first_patch(p, image) + row - row_start[image];
  return {(const char*)p.patches + first * p.patch_strides.row * bytes, least(count, all_patches(p) - first),
          p.dim * bytes, p.patch_strides.row * bytes, steps};
}

// Returns the prefetch of a product's left operand past its first block of `inner`, which is needed at once.
template <class Op>
Ahead ahead_of_left(const float* left, int64_t capacity, int64_t rows, int64_t inner) {
  const int64_t panels = ceil_div(inner, kPanel), first = Op::kInnerBlock / kPanel, steps = ceil_div(rows, Op::kRows);
  if (panels <= first) return {};
  return {left + first * capacity * kPanel, panels - first, rows * kPanel * 4, capacity * kPanel * 4,
          steps * (ceil_div(inner, Op::kInnerBlock) - 1)};
}

// Computes one panel of the product in whole tiles of rows: c [rows, panel] (+)= left [rows, inner] right [inner,
// panel]. `fetch` prefetches c, for a c that is in no near cache: a tile's stores would wait for their lines.
template <class Op>
void product(const float* left, int64_t capacity, int64_t rows, const float* right, int64_t inner, float* c, bool add,
             Ahead* ahead = nullptr, bool fetch = false) {
  const int64_t block = capacity * kPanel;
  for (int64_t at = 0; at < inner; at += Op::kInnerBlock)
    for (int64_t row = 0; row < rows; row += Op::kRows) {
      const float *a = left + at / kPanel * block + row * kPanel, *b = right + at * kPanel;
      const int64_t length = least(Op::kInnerBlock, inner - at);
      if (!Op::kMatrix && ahead) ahead->step();
      if constexpr (Op::kMatrix) {
#if defined(PACL_MATRIX_UNIT)
        if (row + Op::kRows < rows) {
          if (ahead) {
            const int64_t lines = ceil_div(2 * ahead->lines_per_step, length / kMatrixUnits);
            matrix_tile<2>(a, block, b, c + row * kPanel, length, add || at > 0, [&] { ahead->fetch(lines); });
          } else {
            matrix_tile<2>(a, block, b, c + row * kPanel, length, add || at > 0, [] {});
          }
          row += Op::kRows;
        } else {
          matrix_tile<1>(a, block, b, c + row * kPanel, length, add || at > 0, [] {});
        }
#endif
      } else {
        if (fetch && at == 0)
          for (int i = 0; i < Op::kRows * kPanel; i += kLanes) __builtin_prefetch(c + row * kPanel + i, 1);
        tile<Op, Op::kRows, kPanel, 1>(a, block, b, c + row * kPanel, length, add || at > 0);
      }
    }
}

// Returns the number of times that `panels` products call step().
template <class Op>
inline int64_t product_steps(int64_t panels, int64_t rows, int64_t inner) {
  return panels * ceil_div(rows, Op::kRows) * ceil_div(inner, Op::kInnerBlock);
}

}  // namespace
