// The cosine form. With a the attention, q = G a, r² = aᵀ q and φ = u / r:
//   dS = g (a / r) (1 + (s - (φ / r) q) / τ),  and the pooled norm adds  -C P̂  to the patches' gradient,
//   C[n, m] = Σ_k g (φ / r²) a_n a_m.  At its floor r is a constant: q and C drop out and s - φ r remains.
#pragma once

#include "dot.h"

namespace {

using namespace pacl;

constexpr float kMinPooledNorm = 1e-6f;

// Units of pairs of rows of a panel [count, kPanel] of float32, `count` even; for float32 the panel itself.
template <class Op>
const float* row_units_of(const float* panel, [[maybe_unused]] int64_t count, [[maybe_unused]] float* to) {
#if defined(__AVX512BF16__)
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

// Panels [rows, columns] of float32 as panels of units of pairs of columns; for float32 the matrix itself.
template <class Op>
const float* column_units_of(const float* matrix, [[maybe_unused]] int64_t capacity, [[maybe_unused]] int64_t rows,
                             [[maybe_unused]] int64_t columns, [[maybe_unused]] float* to) {
#if defined(__AVX512BF16__)
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

// A symmetric matrix [count, count] as panels, each known from its own first row on: multiplies rows and columns by
// `norms` and `sign`, fills the rows above from earlier panels, and sets columns past the last one to 0.
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
    // A product's rows past `count` hold anything, NaN included: 0 times that is not 0.
    for (int64_t row = 0; live < kPanel && row < count; ++row)
      memset(panel + row * kPanel + live, 0, sizeof(float) * (kPanel - live));
  }
}

// scratch.gram = p pᵀ / (‖p‖ ‖p‖) of rows [first, first + count), as panels [count, count] with `capacity` rows each.
template <class Op>
void gram(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch, int64_t capacity) {
  const int64_t units = dim_units<Op>(p);
  for (int64_t column = 0; column < count; column += kPanel) {
    for (int64_t u = 0; u < units; u += kLanes) {
      const float* block = rows.units + (u / kPanel * rows.capacity + first + column) * kPanel + u % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes)
        transpose(block + i * kPanel, kPanel, scratch.transposed + u * kPanel + i, kPanel);
    }
    const int64_t top = column / kTileRows * kTileRows;  // symmetric: rows above are filled in at the end
    product<Op>(rows.units + (first + top) * kPanel, rows.capacity, count - top, scratch.transposed, dim_inner<Op>(p),
                scratch.gram + (column / kPanel * capacity + top) * kPanel, false);
  }
  complete_symmetric(scratch.gram, capacity, count, rows.inv_norm + first, 1.0f);
}

// q = G a for a panel of attention over `count` rows, whose rows up to the next multiple of 4 are set to 0. In float32
// for bfloat16 too: in φ the error would be multiplied by the logit scale, in the gradient divided by r τ.
void gram_product(Scratch& scratch, int64_t capacity, int64_t count) {
  const int64_t padded = round_up(count, 4);
  memset(scratch.attention + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  product<Float32>(scratch.gram, capacity, count, scratch.attention, padded, scratch.pooled, false);
}

// r = sqrt(aᵀ q) for half `v` of a panel.
inline V pooled_norm(const Scratch& scratch, int64_t count, int v) {
  V squared{};
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    V part{};
    for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      part += load(scratch.attention + i) * load(scratch.pooled + i);
    }
    squared += part;
  }
  for (int i = 0; i < kLanes; ++i) squared[i] = __builtin_sqrtf(squared[i] < 0 ? 0.0f : squared[i]);  // NaN stays NaN
  return squared;
}

// Forward: u -> u / max(r, floor), both not yet divided by the sum l of the attention: hence floor l, and times l.
inline void divide_by_pooled_norm(Scratch& scratch, int64_t capacity, int64_t count, const float* total,
                                  float* weighted) {
  gram_product(scratch, capacity, count);
  for (int v = 0; v < 2; ++v) {
    const V l = load(total + v * kLanes), norm = maximum(kMinPooledNorm * l, pooled_norm(scratch, count, v));
    store(weighted + v * kLanes, load(weighted + v * kLanes) / norm * l);
  }
}

// C (lower half of its panels) += scaled attentionᵀ over the texts of one panel.
template <class Op>
void outer_product(Scratch& scratch, int64_t count, int64_t capacity, bool add) {
  const int64_t padded = round_up(count, kPanel);
  memset(scratch.attention + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  const float* left = column_units_of<Op>(scratch.scaled, 0, count, kPanel, scratch.scaled_units);
  float* transposed = scratch.attention_t;
  for (int64_t m = 0; m < padded; m += kPanel) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      for (int64_t k = 0; k < kPanel; k += kLanes)
        transpose(scratch.attention + (m + i) * kPanel + k, kPanel, transposed + k * kPanel + i, kPanel);
    const int64_t top = m / kTileRows * kTileRows;
    product<Op>(left + top * kPanel, 0, count - top, row_units_of<Op>(transposed, kPanel, scratch.attention_t_units),
                kPanel / Op::kPair, scratch.outer + (m / kPanel * capacity + top) * kPanel, add);
  }
}

// patches_sum (+)= -C P̂ for the `count` rows from `first` on, `padded` of them with their padding.
template <class Op>
void subtract_pooled(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, int64_t padded, float* outer,
                     int64_t capacity, float* patches_sum, bool add, Scratch& scratch) {
  complete_symmetric(outer, capacity, count, rows.inv_norm + first, -1.0f);
  const float* left = column_units_of<Op>(outer, capacity, count, count, scratch.outer_units);
  const int64_t row_units = rows.capacity / Op::kPair;
  for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel) {
    product<Op>(left, capacity, count, rows.row_units + (panel * row_units + first / Op::kPair) * kPanel,
                padded / Op::kPair, scratch.pooled, false);
    float* to = patches_sum + (panel * rows.capacity + first) * kPanel;
    for (int64_t i = 0; i < count * kPanel; i += kLanes)
      store(to + i, add ? load(to + i) + load(scratch.pooled + i) : load(scratch.pooled + i));
    if (!add) memset(to + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  }
}

// The attention of a panel, not yet divided by its sum, into scratch.attention; scratch.scores become s. Σ e and Σ e s are
// made again and not taken from lse and φ, whose rounding, divided by τ, would not cancel.
template <bool kBounded>
inline void attend(Scratch& scratch, const float* inv_norm, int64_t count, const float* text_norm, float temperature,
                   const Lane& lse, V total[2], V weighted[2]) {
  const float scale = kLog2e / temperature;
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes), shift = lse.half[v] * kLog2e;
    total[v] = weighted[v] = V{};
    for (int64_t begin = 0; begin < count; begin += kSumRows) {
      V part{}, part_weighted{};
      for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
        const int64_t i = r * kPanel + v * kLanes;
        const V s = load(scratch.scores + i) * (norm * inv_norm[r]);
        const V e = kBounded ? exp2<false>(s * scale) : exp2<true>(s * scale - shift);
        store(scratch.scores + i, s);
        store(scratch.attention + i, e);
        part += e;
        part_weighted += e * s;
      }
      total[v] += part;
      weighted[v] += part_weighted;
    }
  }
}

template <class Op>
double weights_cosine(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                      int64_t panel_first, int64_t panel_last, Weights& to, float* patches_sum, bool add,
                      Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), padded = last - first;
  const int64_t count = segment_end(rows, first, last) - first, capacity = scratch.rows.capacity;
  const float* left = rows.units + first * kPanel;
  const float* inv_norm = rows.inv_norm + first;
  Ahead ahead = ahead_of_left(left, rows.capacity, count, inner);
  double total = 0;
  gram<Op>(p, rows, first, count, scratch, capacity);
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    product<Op>(left, rows.capacity, count, texts.transposed + panel * units * kPanel, inner, scratch.scores, false,
                &ahead);
    const int64_t at = rows.image[first] * p.texts_count + texts.first + k;
    const Lane lse(p.lse + at, live), g(p.grad_phi + at, live);
    V sums[2], weighted[2];
    (is_bounded(p) ? attend<true> : attend<false>)(scratch, inv_norm, count, texts.inv_norm + k, p.temperature, lse, sums,
                                                   weighted);
    gram_product(scratch, capacity, count);
    for (int v = 0; v < 2; ++v) {
      const V norm = load(texts.inv_norm + k + v * kLanes), share = 1.0f / sums[v];  // a = e share
      const V u = weighted[v] * share;
      V radius = pooled_norm(scratch, count, v) * share, along{};
      const I floored = radius <= broadcast(kMinPooledNorm);
      radius = select(floored, broadcast(kMinPooledNorm), radius);
      const V slope = select(floored, V{}, u / (radius * radius) * share), centre = select(floored, u, V{});
      const V alpha = g.half[v] / radius * share, beta = alpha / p.temperature, outer_scale = alpha * slope;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = r * kPanel + v * kLanes;
        const V s = load(scratch.scores + i), e = load(scratch.attention + i), q = load(scratch.pooled + i);
        const V centred = s - centre - slope * q;
        along += e * centred * (s - u);
        store(scratch.scores + i, e * (alpha + beta * centred) * (norm * inv_norm[r]));
        store(scratch.scaled + i, e * outer_scale);
      }
      total += sum(along * alpha);
    }
    memset(scratch.scores + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
    store_weights<Op>(scratch.scores, rows, first, last, panel, to);
    if (patches_sum)
      outer_product<Op>(scratch, count, capacity, panel > panel_first);
  }
  if (patches_sum)
    subtract_pooled<Op>(p, rows, first, count, padded, scratch.outer, capacity, patches_sum, add, scratch);
  return total;
}

}  // namespace
