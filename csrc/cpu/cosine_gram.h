// The cosine form from the Gram matrix G of an image: q = G a, the norm term C and its product C P̂. See cosine.h.
#pragma once

#include "softmax.h"

namespace {

using namespace pacl;

// Converts a float32 panel [count, kPanel], `count` even, to units of pairs of rows; for float32 returns the panel
// itself.
template <class Op>
const float* row_units_of(const float* panel, [[maybe_unused]] int64_t count, [[maybe_unused]] float* to) {
#if defined(PACL_PAIRS)
  if (Op::kPair == 2) {
    for (int64_t r = 0; r < count; r += 2)
      for (int v = 0; v < 2; ++v) {
        const float* at = panel + r * kPanel + v * kLanes;
        store(to + r / 2 * kPanel + v * kLanes, interleave_bfloat16(load(at), load(at + kPanel)));
      }
    return to;
  }
#endif
  return panel;
}

// Converts float32 panels [rows, columns] to panels of units of pairs of columns; for float32 returns the matrix
// itself.
template <class Op>
const float* column_units_of(const float* matrix, [[maybe_unused]] int64_t capacity, [[maybe_unused]] int64_t rows,
                             [[maybe_unused]] int64_t columns, [[maybe_unused]] float* to) {
#if defined(PACL_PAIRS)
  if (Op::kPair == 2) {
    for (int64_t c = 0; c < columns; c += kLanes)
      for (int64_t r = 0; r < rows; ++r) {
        const H rounded = round_to_bfloat16(load(matrix + (c / kPanel * capacity + r) * kPanel + c % kPanel));
        memcpy(to + (c / 2 / kPanel * capacity + r) * kPanel + c / 2 % kPanel, &rounded, sizeof rounded);
      }
    return to;
  }
#endif
  return matrix;
}

// Completes a symmetric matrix [count, count] in panels, each filled from its diagonal down. Multiplies rows and
// columns by `norms` and `sign`, fills the rows above from earlier panels, and zeroes columns past the last one.
void complete_symmetric(float* matrix, int64_t capacity, int64_t count, const float* norms, float sign) {
  for (int64_t column = 0; column < count; column += kPanel) {
    float* panel = matrix + column / kPanel * capacity * kPanel;
    float scale[kPanel] = {};
    const int64_t live = least(kPanel, count - column);
    for (int64_t i = 0; i < live; ++i) scale[i] = sign * norms[column + i];
    for (int64_t row = column; row < count; ++row)
      for (int v = 0; v < 2; ++v) {
        float* at = panel + row * kPanel + v * kLanes;
        store(at, load(at) * (load(scale + v * kLanes) * norms[row]));
      }
    for (int64_t row = 0; row < column; row += kLanes) {
      const float* mirror = matrix + row / kPanel * capacity * kPanel + column * kPanel + row % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes)
        transpose(mirror + i * kPanel, kPanel, panel + row * kPanel + i, kPanel);
    }
    // A product's rows past `count` may hold anything, also NaN, and 0 times NaN is not 0.
    for (int64_t row = 0; live < kPanel && row < count; ++row)
      memset(panel + row * kPanel + live, 0, sizeof(float) * (kPanel - live));
  }
}

// Computes scratch.gram = p pᵀ of rows [first, first + count), as panels [count, count] of `capacity` rows. Each panel
// is filled from its diagonal down.
template <class Op>
void gram(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch,
          int64_t capacity) {
  const int64_t units = dim_units<Op>(p);
  for (int64_t column = 0; column < count; column += kPanel) {
    for (int64_t u = 0; u < units; u += kLanes) {
      const float* block = rows.units + (u / kPanel * rows.capacity + first + column) * kPanel + u % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes)
        transpose(block + i * kPanel, kPanel, scratch.transposed + u * kPanel + i, kPanel);
    }
    const int64_t top = column / Op::kRows * Op::kRows;  // symmetric: the rows above are filled in later
    product<Op>(rows.units + (first + top) * kPanel, rows.capacity, count - top, scratch.transposed, dim_inner<Op>(p),
                scratch.gram + (column / kPanel * capacity + top) * kPanel, false);
  }
}

// Reduces G, as gram() leaves it, to what eᵀ G e needs: its lower triangle, doubled below the diagonal, with rows and
// columns multiplied by `norms`.
inline void fold_symmetric(float* matrix, int64_t capacity, int64_t count, const float* norms) {
  const I lane = lane_numbers();
  for (int64_t column = 0; column < count; column += kPanel) {
    float* panel = matrix + column / kPanel * capacity * kPanel;
    float scale[kPanel] = {};
    memcpy(scale, norms + column, sizeof(float) * least(kPanel, count - column));
    // A tile of earlier rows may read this panel, up to the next multiple of 4 after the tile's last row.
    for (int64_t row = most(0, column - kTileRows - 2); row < count; ++row)
      for (int v = 0; v < 2; ++v) {
        float* at = panel + row * kPanel + v * kLanes;
        const I before = lane + (int32_t)(column + v * kLanes - row);  // negative below the diagonal
        const V x = load(at) * (load(scale + v * kLanes) * norms[row]);
        store(at, select(before < I{}, x + x, select(before == I{}, x, V{})));
      }
  }
}

// Splits G for the matrix unit into the sum of two bfloat16 matrices, with a relative error of 2^-17. With kLower only
// its lower triangle.
template <class Op, bool kLower>
void split_gram([[maybe_unused]] Scratch& scratch, [[maybe_unused]] int64_t capacity, [[maybe_unused]] int64_t count) {
#if defined(PACL_MATRIX_UNIT)
  if constexpr (Op::kMatrix)
    for (int64_t column = 0; column < count; column += kPanel)
      for (int64_t row = kLower ? column : 0; row < count; ++row) {
        const float* at = scratch.gram + (column / kPanel * capacity + row) * kPanel;
        const int64_t to = (column / 2 / kPanel * capacity + row) * kPanel + column / 2 % kPanel;
        for (int v = 0; v < 2; ++v) {
          const V x = load(at + v * kLanes);
          const H high = round_to_bfloat16(x), low = round_to_bfloat16(x - from_bfloat16(high));
          memcpy(scratch.gram_high + to + v * kLanes / 2, &high, sizeof high);
          memcpy(scratch.gram_low + to + v * kLanes / 2, &low, sizeof low);
        }
      }
#endif
}

#if defined(PACL_MATRIX_UNIT)
// Computes rows [row, row + 16 kTall) of G a over `inner` units, from the two parts of both operands. The product of
// the two small parts is left out.
template <int kTall>
inline void split_tile(const Scratch& scratch, int64_t capacity, int64_t row, int64_t inner) {
  const int64_t block = capacity * kPanel, at = row * kPanel;
  float* c = scratch.gram_attention + at;
  matrix_begin<kTall>(c, false);
  matrix_add<kTall>(scratch.gram_low + at, kPanel, block, scratch.attention_high, inner, [] {});
  matrix_add<kTall>(scratch.gram_high + at, kPanel, block, scratch.attention_low, inner, [] {});
  matrix_add<kTall>(scratch.gram_high + at, kPanel, block, scratch.attention_high, inner, [] {});
  matrix_end<kTall>(c);
}
#endif

// Computes scratch.gram_attention = G a for a panel of attention over `count` rows, and zeroes the attention's padding
// rows. It uses float32, or pairs of bfloat16 numbers in the matrix unit. The error of a single bfloat16 would be
// multiplied by the logit scale in the loss, and divided by r τ in the gradient. With kLower, G is its lower triangle.
template <class Op, bool kLower>
void gram_attention(Scratch& scratch, int64_t capacity, int64_t count) {
  const int64_t padded = round_up(count, Op::kMatrix ? kPanel : 4);
  memset(scratch.attention + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
#if defined(PACL_MATRIX_UNIT)
  if constexpr (Op::kMatrix) {
    for (int64_t r = 0; r < padded; r += 2)
      for (int v = 0; v < 2; ++v) {
        const float* at = scratch.attention + r * kPanel + v * kLanes;
        const V even = load(at), odd = load(at + kPanel);
        const V even_high = from_bfloat16(round_to_bfloat16(even)), odd_high = from_bfloat16(round_to_bfloat16(odd));
        const int64_t to = r / 2 * kPanel + v * kLanes;
        store(scratch.attention_high + to, interleave_bfloat16(even_high, odd_high));
        store(scratch.attention_low + to, interleave_bfloat16(even - even_high, odd - odd_high));
      }
    for (int64_t row = 0; row < count; row += kPanel) {
      const int64_t inner = (kLower ? row + kPanel : padded) / 2;
      count - row > kMatrixRows ? split_tile<2>(scratch, capacity, row, inner)
                                : split_tile<1>(scratch, capacity, row, inner);
    }
    return;
  }
#endif
  for (int64_t at = 0; at < padded; at += Float32::kInnerBlock)
    for (int64_t row = 0; row < count; row += kTileRows) {
      const int64_t end = kLower ? least(padded, round_up(row + kTileRows, 4)) : padded;
      if (at < end)
        tile<Float32, kTileRows, kPanel, 1>(scratch.gram + (at / kPanel * capacity + row) * kPanel, capacity * kPanel,
                                            scratch.attention + at * kPanel, scratch.gram_attention + row * kPanel,
                                            least(Float32::kInnerBlock, end - at), at > 0);
    }
}

// Returns r² = eᵀ q for half `v` of a panel, where e is not yet divided by its sum.
inline V squared_norm_from_gram(const Scratch& scratch, int64_t count, int v) {
  V squared{};
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    V part{};
    for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      part = fma(load(scratch.attention + i), load(scratch.gram_attention + i), part);
    }
    squared += part;
  }
  return squared;
}

// C (+)= scaled · attentionᵀ over the texts of one panel, in each panel of C from its diagonal down.
template <class Op>
void add_norm_term(Scratch& scratch, int64_t count, int64_t capacity, bool add) {
  const int64_t padded = round_up(count, kPanel);
  memset(scratch.attention + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  const float* left = column_units_of<Op>(scratch.scaled, 0, count, kPanel, scratch.scaled_units);
  float* transposed = scratch.attention_t;
  for (int64_t m = 0; m < padded; m += kPanel) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      for (int64_t k = 0; k < kPanel; k += kLanes)
        transpose(scratch.attention + (m + i) * kPanel + k, kPanel, transposed + k * kPanel + i, kPanel);
    const int64_t top = m / Op::kRows * Op::kRows;
    product<Op>(left + top * kPanel, 0, count - top, row_units_of<Op>(transposed, kPanel, scratch.attention_t_units),
                kPanel / Op::kPair, scratch.norm_term + (m / kPanel * capacity + top) * kPanel, add);
  }
}

// Computes sums (+)= -C P̂ for the `count` rows from `first` on, `padded` rows with their padding.
template <class Op>
void subtract_norm_term_product(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                                int64_t padded, int64_t capacity, const Sums& sums, bool add, Scratch& scratch) {
  complete_symmetric(scratch.norm_term, capacity, count, rows.inv_norm + first, -1.0f);
  const float* left = column_units_of<Op>(scratch.norm_term, capacity, count, padded, scratch.norm_term_units);
  const int64_t row_units = rows.capacity / Op::kPair;
  for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel) {
    float* to = sums.panels + (panel * sums.capacity + first) * kPanel;
    const float* right = rows.row_units + (panel * row_units + first / Op::kPair) * kPanel;
    if (Op::kMatrix) {  // the last tile of an image ends in the image's padding
      product<Op>(left, capacity, count, right, padded / Op::kPair, to, add);
      continue;
    }
    product<Op>(left, capacity, count, right, padded / Op::kPair, scratch.gram_attention, false);
    for (int64_t i = 0; i < count * kPanel; i += kLanes)
      store(to + i, add ? load(to + i) + load(scratch.gram_attention + i) : load(scratch.gram_attention + i));
    if (!add) memset(to + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  }
}

}  // namespace
