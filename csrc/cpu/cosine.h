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

// Panels [rows, columns] of float32 as panels of units of pairs of columns; for float32 the matrix itself.
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

// scratch.gram = p pᵀ of rows [first, first + count), as panels [count, count] with `capacity` rows each, of which each
// is known from its own first row on.
template <class Op>
void gram(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch, int64_t capacity) {
  const int64_t units = dim_units<Op>(p);
  for (int64_t column = 0; column < count; column += kPanel) {
    for (int64_t u = 0; u < units; u += kLanes) {
      const float* block = rows.units + (u / kPanel * rows.capacity + first + column) * kPanel + u % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes)
        transpose(block + i * kPanel, kPanel, scratch.transposed + u * kPanel + i, kPanel);
    }
    const int64_t top = column / Op::kRows * Op::kRows;  // symmetric: rows above are filled in at the end
    product<Op>(rows.units + (first + top) * kPanel, rows.capacity, count - top, scratch.transposed, dim_inner<Op>(p),
                scratch.gram + (column / kPanel * capacity + top) * kPanel, false);
  }
}

// G, known as above, for eᵀ G e alone: its lower triangle, everything below the diagonal twice; rows and columns times
// `norms`.
inline void fold_symmetric(float* matrix, int64_t capacity, int64_t count, const float* norms) {
  I lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t column = 0; column < count; column += kPanel) {
    float* panel = matrix + column / kPanel * capacity * kPanel;
    float scale[kPanel] = {};
    memcpy(scale, norms + column, sizeof(float) * least(kPanel, count - column));
    // The tile of earlier rows may reach into this panel, up to the next multiple of 4 after its last row.
    for (int64_t row = most(0, column - kTileRows - 2); row < count; ++row)
      for (int v = 0; v < 2; ++v) {
        float* at = panel + row * kPanel + v * kLanes;
        const I before = lane + (int32_t)(column + v * kLanes - row);  // negative below the diagonal
        const V x = load(at) * (load(scale + v * kLanes) * norms[row]);
        store(at, select(before < I{}, x + x, select(before == I{}, x, V{})));
      }
  }
}

// For the matrix unit, G is the sum of two matrices of bfloat16, which leaves 2^-17 of it. kLower: its lower triangle.
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
// Rows [row, row + 16 kTall) of G a over `inner` units, of what the two parts of both give all but the product of the
// small ones.
template <int kTall>
inline void split_tile(const Scratch& scratch, int64_t capacity, int64_t row, int64_t inner) {
  const int64_t block = capacity * kPanel, at = row * kPanel;
  float* c = scratch.pooled + at;
  matrix_begin<kTall>(c, false);
  matrix_add<kTall>(scratch.gram_low + at, kPanel, block, scratch.attention_high, inner, [] {});
  matrix_add<kTall>(scratch.gram_high + at, kPanel, block, scratch.attention_low, inner, [] {});
  matrix_add<kTall>(scratch.gram_high + at, kPanel, block, scratch.attention_high, inner, [] {});
  matrix_end<kTall>(c);
}
#endif

// scratch.pooled = G a for a panel of attention over `count` rows, whose rows up to the next multiple of 2 kInner are
// set to 0. In bfloat16 alone, an error in φ would be multiplied by the logit scale, in the gradient divided by r τ: it
// is float32, or in the matrix unit two numbers of bfloat16. kLower: of G's lower triangle.
template <class Op, bool kLower>
void gram_product(Scratch& scratch, int64_t capacity, int64_t count) {
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
                                            scratch.attention + at * kPanel, scratch.pooled + row * kPanel,
                                            least(Float32::kInnerBlock, end - at), at > 0);
    }
}

// r² = eᵀ q for half `v` of a panel, with e not yet divided by its sum.
inline V pooled_norm_squared(const Scratch& scratch, int64_t count, int v) {
  V squared{};
  for (int64_t begin = 0; begin < count; begin += kSumRows) {
    V part{};
    for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      part = fma(load(scratch.attention + i), load(scratch.pooled + i), part);
    }
    squared += part;
  }
  return squared;
}

// True where r² of any text is much smaller than Σ e², which it is about for patches of random directions: what is left
// is then the rounding of G.
inline bool cancels(const Scratch& scratch, const float* inv_norm, int64_t count, const float* text_norm,
                    const V squared[2]) {
  bool any = false;
  for (int v = 0; v < 2; ++v) {
    V incoherent{};
    for (int64_t r = 0; r < count; ++r) {
      const V e = load(scratch.attention + r * kPanel + v * kLanes);
      incoherent = inv_norm[r] > 0 ? fma(e, e, incoherent) : incoherent;
    }
    const I below = (squared[v] < incoherent * 0.25f) & (load(text_norm + v * kLanes) > V{});  // not padding
    for (int i = 0; i < kLanes; ++i) any |= below[i] != 0;
  }
  return any;
}

inline V square_root(V x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i] < 0 ? 0.0f : x[i]);  // NaN stays NaN
  return x;
}

// Half `half` of a unit, in all lanes, as a float.
template <class Op>
inline V element(V unit, [[maybe_unused]] int half) {
  if (Op::kPair == 1) return unit;
  return from_bits(half ? bits(unit) & (int32_t)0xFFFF0000 : bits(unit) << 16);
}

typedef double Wide __attribute__((vector_size(8 * kLanes)));
inline void add_product(Wide& sum, V a, V b) {
  sum += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
}

// scratch.direction = t̂ - slope v [D, panel] with v in scratch.pool; without `slope` t̂.
template <class Op>
void set_direction(const ScoreParams& p, const Texts& texts, int64_t panel, const V* slope, Scratch& scratch) {
  const float* text = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  for (int64_t d = 0; d < dim_inner<Op>(p) * Op::kPair; ++d)
    for (int v = 0; v < 2; ++v) {
      const int64_t i = d * kPanel + v * kLanes;
      V t = element<Op>(load(text + d / Op::kPair * kPanel + v * kLanes), d % Op::kPair);
      t *= load(texts.inv_norm + panel * kPanel + v * kLanes);
      store(scratch.direction + i, slope ? fma(-slope[v], load(scratch.pool + i), t) : t);
    }
}

// `to` = p̂ · scratch.direction for the `count` rows from `first` on.
template <class Op>
void scores_in_double(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch,
                      float* to) {
  for (int64_t r = 0; r < count; ++r)
    for (int v = 0; v < 2; ++v) {
      Wide sum{};
      for (int64_t d = 0; d < dim_inner<Op>(p) * Op::kPair; ++d) {
        const int64_t u = d / Op::kPair;
        const V unit = Op::broadcast_unit(rows.units + (u / kPanel * rows.capacity + first + r) * kPanel + u % kPanel);
        add_product(sum, element<Op>(unit, d % Op::kPair), load(scratch.direction + d * kPanel + v * kLanes));
      }
      store(to + r * kPanel + v * kLanes, __builtin_convertvector(sum, V) * rows.inv_norm[first + r]);
    }
}

// scratch.pool = Σ e p̂ [D, panel] where patches cancel, with e = exp((s - largest) / τ). Rare, so short rather than
// fast: in double, whose rounding is small beside what is left. scratch.scores become s, and scratch.attention and
// `sums` are made again of it, because τ would divide the difference of two roundings of s; scratch.pooled is written
// over.
template <class Op>
void pool(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, const Texts& texts, int64_t panel,
          Softmax& sums, Scratch& scratch) {
  set_direction<Op>(p, texts, panel, nullptr, scratch);
  scores_in_double<Op>(p, rows, first, count, scratch, scratch.scores);
  for (int v = 0; v < 2; ++v) {
    V largest = is_bounded(p) ? V{} : broadcast(kBelowEveryScore);
    for (int64_t r = 0; !is_bounded(p) && r < count; ++r)
      largest = maximum(load(scratch.scores + r * kPanel + v * kLanes), largest);
    Wide total{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      const V s = load(scratch.scores + i);
      Wide exact;
      for (int lane = 0; lane < kLanes; ++lane)
        exact[lane] = __builtin_exp(((double)s[lane] - largest[lane]) / p.temperature);
      const V e = __builtin_convertvector(exact, V);
      store(scratch.attention + i, e);
      store(scratch.pooled + i, __builtin_convertvector(exact - __builtin_convertvector(e, Wide), V));
      total += exact;
    }
    sums.largest[v] = largest;
    sums.sum[v] = __builtin_convertvector(total, V);
  }
  for (int64_t d = 0; d < padded_dim(p.dim); ++d) {
    const int64_t u = d / Op::kPair;
    const float* unit = rows.units + (u / kPanel * rows.capacity + first) * kPanel + u % kPanel;
    for (int v = 0; v < 2; ++v) {
      Wide sum{};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = r * kPanel + v * kLanes;
        const V x = element<Op>(Op::broadcast_unit(unit + r * kPanel), d % Op::kPair) * rows.inv_norm[first + r];
        add_product(sum, x, load(scratch.attention + i));
        add_product(sum, x, load(scratch.pooled + i));
      }
      store(scratch.pool + d * kPanel + v * kLanes, __builtin_convertvector(sum, V));
    }
  }
}

// With more patches than dimensions it is cheaper to pool them than to make G.
template <class Op>
inline bool pools(const ScoreParams& p, int64_t count) {
  return Op::kPair == 1 && count > p.dim;
}

// scratch.pool = Σ e p̂ [D, panel] in float32; writes over scratch.scaled.
inline void pool_product(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch) {
  const int64_t padded = round_up(count, 4);
  for (int64_t i = 0; i < count * kPanel; i += kLanes)
    store(scratch.scaled + i, load(scratch.attention + i) * rows.inv_norm[first + i / kPanel]);
  memset(scratch.scaled + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  for (int64_t at = 0; at < padded; at += Float32::kInnerBlock)
    for (int64_t d = 0; d < padded_dim(p.dim); d += kTileColumns)
      tile<Float32, kTileColumns, 1, kPanel>(
          rows.units + (d / kPanel * rows.capacity + first + at) * kPanel + d % kPanel, kPanel * kPanel,
          scratch.scaled + at * kPanel, scratch.pool + d * kPanel, least(Float32::kInnerBlock, padded - at), at > 0);
}

// From scratch.pool: Σ e p̂ · t̂, and the squared norm.
template <class Op>
void pooled_score(const ScoreParams& p, const Texts& texts, int64_t panel, const Scratch& scratch, V along[2],
                  V squared[2]) {
  const float* text = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  for (int v = 0; v < 2; ++v) {
    Wide dot{}, norm{};
    for (int64_t d = 0; d < dim_inner<Op>(p) * Op::kPair; ++d) {
      const V x = load(scratch.pool + d * kPanel + v * kLanes);
      add_product(dot, x, element<Op>(load(text + d / Op::kPair * kPanel + v * kLanes), d % Op::kPair));
      add_product(norm, x, x);
    }
    along[v] = __builtin_convertvector(dot, V) * load(texts.inv_norm + panel * kPanel + v * kLanes);
    squared[v] = __builtin_convertvector(norm, V);
  }
}

// Forward, for an image whose `count` rows lead `rows`: φ = u / max(r, floor). u and r are not yet divided by Σ e,
// hence a floor times that.
template <class Op>
void cosine_of_pooled(const ScoreParams& p, const Rows& rows, int64_t count, const Texts& texts, int64_t panel,
                      Softmax& sums, Scratch& scratch, float* phi) {
  V along[2], squared[2];
  if (pools<Op>(p, count)) {
    pool_product(p, rows, 0, count, scratch);
    pooled_score<Op>(p, texts, panel, scratch, along, squared);
  } else {
    gram_product<Op, true>(scratch, rows.capacity, count);
    for (int v = 0; v < 2; ++v) {
      along[v] = is_bounded(p) ? sums.weighted[v] * (kLn2 * p.temperature)
                               : fma(sums.largest[v], sums.sum[v], sums.weighted[v]);
      squared[v] = pooled_norm_squared(scratch, count, v);
    }
  }
  if (cancels(scratch, rows.inv_norm, count, texts.inv_norm + panel * kPanel, squared)) {
    pool<Op>(p, rows, 0, count, texts, panel, sums, scratch);
    pooled_score<Op>(p, texts, panel, scratch, along, squared);
  }
  for (int v = 0; v < 2; ++v)
    store(phi + v * kLanes, along[v] / maximum(kMinPooledNorm * sums.sum[v], square_root(squared[v])));
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
    const int64_t top = m / Op::kRows * Op::kRows;
    product<Op>(left + top * kPanel, 0, count - top, row_units_of<Op>(transposed, kPanel, scratch.attention_t_units),
                kPanel / Op::kPair, scratch.outer + (m / kPanel * capacity + top) * kPanel, add);
  }
}

// Sums (+)= -C P̂ for the `count` rows from `first` on, `padded` of them with their padding.
template <class Op>
void subtract_pooled(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, int64_t padded,
                     int64_t capacity, const Sums& sums, bool add, Scratch& scratch) {
  complete_symmetric(scratch.outer, capacity, count, rows.inv_norm + first, -1.0f);
  const float* left = column_units_of<Op>(scratch.outer, capacity, count, padded, scratch.outer_units);
  const int64_t row_units = rows.capacity / Op::kPair;
  for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel) {
    float* to = sums.panels + (panel * sums.capacity + first) * kPanel;
    const float* right = rows.row_units + (panel * row_units + first / Op::kPair) * kPanel;
    if (Op::kMatrix) {  // an image's padding holds the rest of its last tile
      product<Op>(left, capacity, count, right, padded / Op::kPair, to, add);
      continue;
    }
    product<Op>(left, capacity, count, right, padded / Op::kPair, scratch.pooled, false);
    for (int64_t i = 0; i < count * kPanel; i += kLanes)
      store(to + i, add ? load(to + i) + load(scratch.pooled + i) : load(scratch.pooled + i));
    if (!add) memset(to + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  }
}

// The softmax of a panel: scratch.scores become s, scratch.attention e, not yet divided by Σ e. Its sums are made again
// and not taken from forward's, whose rounding, divided by τ, would not cancel. s is relative to `largest` in
// `weighted`; without kBounded that is the largest s, and 0 otherwise.
template <bool kBounded>
inline void attend(Scratch& scratch, const float* inv_norm, int64_t count, const float* text_norm, float temperature,
                   Softmax& sums) {
  const float scale = kLog2e / temperature;
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes);
    V largest = kBounded ? V{} : broadcast(kBelowEveryScore);
    for (int64_t r = 0; !kBounded && r < count; ++r)
      largest = maximum(load(scratch.scores + r * kPanel + v * kLanes) * (norm * inv_norm[r]), largest);
    sums.largest[v] = largest;
    sums.sum[v] = sums.weighted[v] = V{};
    for (int64_t begin = 0; begin < count; begin += kSumRows) {
      V part{}, part_weighted{};
      for (int64_t r = begin; r < least(begin + kSumRows, count); ++r) {
        const int64_t i = r * kPanel + v * kLanes;
        const V s = load(scratch.scores + i) * (norm * inv_norm[r]), z = kBounded ? s : s - largest;
        const V e = exp2<!kBounded>(z, scale);
        store(scratch.scores + i, s);
        store(scratch.attention + i, e);
        part += e;
        part_weighted = fma(e, z, part_weighted);
      }
      sums.sum[v] += part;
      sums.weighted[v] += part_weighted;
    }
  }
}

// scratch.pooled = p̂ · scratch.direction in float32, for the `count` rows from `first` on.
inline void scores_of_direction(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count,
                                Scratch& scratch) {
  product<Float32>(rows.units + first * kPanel, rows.capacity, count, scratch.direction, dim_inner<Float32>(p),
                   scratch.pooled, false);
  for (int64_t i = 0; i < count * kPanel; i += kLanes)
    store(scratch.pooled + i, load(scratch.pooled + i) * rows.inv_norm[first + i / kPanel]);
}

// Sums -= scratch.scaled v / ‖p‖ for the `count` rows from `first` on: what C P̂ is for one panel of texts whose
// pooled patches v are in scratch.pool.
inline void subtract_pool(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, const Sums& sums,
                          Scratch& scratch) {
  for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      for (int64_t k = 0; k < kPanel; k += kLanes)
        transpose(scratch.pool + (panel * kPanel + i) * kPanel + k, kPanel, scratch.attention_t + k * kPanel + i,
                  kPanel);
    product<Float32>(scratch.scaled, 0, count, scratch.attention_t, kPanel, scratch.pooled, false);
    float* to = sums.panels + (panel * sums.capacity + first) * kPanel;
    for (int64_t i = 0; i < count * kPanel; i += kLanes)
      store(to + i, fma(load(scratch.pooled + i), -rows.inv_norm[first + i / kPanel], load(to + i)));
  }
}

// scratch.pooled = s - centre - slope q (`given`: s - slope q is there already), less its mean, which is 0 but for
// rounding: divided by τ, that would show where all s are nearly equal.
inline void recentre(Scratch& scratch, int64_t count, const Softmax& sums, const V slope[2], const V centre[2],
                     bool given) {
  for (int v = 0; v < 2; ++v) {
    V mean{};
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = r * kPanel + v * kLanes;
      const V q = load(scratch.pooled + i), x = (given ? q : fma(-slope[v], q, load(scratch.scores + i))) - centre[v];
      store(scratch.pooled + i, x);
      mean = fma(load(scratch.attention + i), x, mean);
    }
    mean /= sums.sum[v];
    for (int64_t r = 0; r < count; ++r) {
      float* at = scratch.pooled + r * kPanel + v * kLanes;
      store(at, load(at) - mean);
    }
  }
}

// Half `v` of a panel: scratch.scores become weights, scratch.scaled what C is made of. kReady: scratch.pooled holds
// s - centre - slope q. Returns the temperature's sum.
template <bool kReady>
inline float cosine_weights(Scratch& scratch, const float* inv_norm, int64_t count, V norm, float temperature, V alpha,
                            V slope, V centre, V largest, V along, V mean, int v) {
  const V beta = alpha / temperature, outer_scale = alpha * slope;  // beta overflows at the smallest temperatures
  const float inv_temperature = 1.0f / temperature;
  V total{};
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = r * kPanel + v * kLanes;
    const V s = load(scratch.scores + i), e = load(scratch.attention + i), q = load(scratch.pooled + i);
    const V centred = kReady ? q : fma(-slope, q, s - centre);
    total = fma(e * centred, s - largest - along, total);
    const V gradient = kReady ? e * alpha * fma(centred, inv_temperature, 1.0f) : e * fma(beta, centred, alpha);
    store(scratch.scores + i, fma(gradient, norm, -mean) * inv_norm[r]);
    store(scratch.scaled + i, e * outer_scale);
  }
  return sum(total * alpha);
}

template <class Op>
WeightSums weights_cosine(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                      int64_t panel_first, int64_t panel_last, Weights& to, const Sums& patch_sums, bool add,
                      Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), padded = last - first;
  const int64_t count = segment_end(rows, first, last) - first, capacity = scratch.rows.capacity;
  const float* left = rows.units + first * kPanel;
  const float* inv_norm = rows.inv_norm + first;
  const bool bounded = is_bounded(p);
  bool outer_started = false;
  Ahead ahead = ahead_of_left<Op>(left, rows.capacity, count, inner);
  WeightSums total;
  if (!pools<Op>(p, count)) {
    gram<Op>(p, rows, first, count, scratch, capacity);
    complete_symmetric(scratch.gram, capacity, count, inv_norm, 1.0f);
    split_gram<Op, false>(scratch, capacity, count);
  }
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    product<Op>(left, rows.capacity, count, texts.transposed + panel * units * kPanel, inner, scratch.scores, false,
                &ahead);
    const Lane g(p.grad_phi + rows.image[first] * p.texts_count + texts.first + k, live);
    Softmax sums;
    (bounded ? attend<true> : attend<false>)(scratch, inv_norm, count, texts.inv_norm + k, p.temperature, sums);
    V along[2], squared[2];  // u, less `largest`, and r²
    bool pooled = pools<Op>(p, count);
    if (pooled) {
      pool_product(p, rows, first, count, scratch);
      pooled_score<Op>(p, texts, panel, scratch, along, squared);
    } else {
      gram_product<Op, false>(scratch, capacity, count);
      for (int v = 0; v < 2; ++v) squared[v] = pooled_norm_squared(scratch, count, v);
    }
    const bool cancel = cancels(scratch, inv_norm, count, texts.inv_norm + k, squared);
    if (cancel) {
      pool<Op>(p, rows, first, count, texts, panel, sums, scratch);
      pooled_score<Op>(p, texts, panel, scratch, along, squared);
      pooled = true;
    }
    for (int v = 0; v < 2; ++v)
      along[v] = pooled ? along[v] / sums.sum[v] - sums.largest[v] : sums.weighted[v] / sums.sum[v];
    V slope[2], radius[2], centre[2];
    for (int v = 0; v < 2; ++v) {
      const V share = 1.0f / sums.sum[v], u = sums.largest[v] + along[v];  // a = e share
      radius[v] = square_root(squared[v]) * share;
      const I floored = radius[v] <= broadcast(kMinPooledNorm);
      radius[v] = select(floored, broadcast(kMinPooledNorm), radius[v]);
      slope[v] = select(floored, V{}, u / (radius[v] * radius[v]) * share);
      centre[v] = select(floored, u, V{});
    }
    if (pooled) set_direction<Op>(p, texts, panel, slope, scratch);
    if (cancel)
      scores_in_double<Op>(p, rows, first, count, scratch, scratch.pooled);
    else if (pooled)
      scores_of_direction(p, rows, first, count, scratch);
    const bool ready = pooled || !bounded;
    if (ready) recentre(scratch, count, sums, slope, centre, pooled);
    const auto to_weights = ready ? cosine_weights<true> : cosine_weights<false>;
    V mean[2]{};
    if (rows.means) {  // Σ dS = g / r
      for (int v = 0; v < 2; ++v) mean[v] = g.half[v] / (radius[v] * (float)count);
      store_mean<Op>(rows, mean_of_row(rows, first), texts.inv_norm + k, panel, true, to, texts, mean);
    }
    for (int v = 0; v < 2; ++v) {
      const V norm = load(texts.inv_norm + k + v * kLanes), alpha = g.half[v] / (radius[v] * sums.sum[v]);
      total.temperature += to_weights(scratch, inv_norm, count, norm, p.temperature, alpha, slope[v], centre[v],
                                      sums.largest[v], along[v], mean[v], v);
    }
    measure_rounding<Op>(p, scratch.scores, inv_norm, count, rows.image[first], texts.inv_norm + k, panel, total);
    memset(scratch.scores + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
    store_weights<Op>(scratch.scores, rows, first, last, texts, panel, to);
    if (!patch_sums.panels) continue;
    if (!pooled) {
      outer_product<Op>(scratch, count, capacity, outer_started);
      outer_started = true;
      continue;
    }
    for (int64_t d = 0; !add && d < padded_dim(p.dim) / kPanel; ++d)
      memset(patch_sums.panels + (d * patch_sums.capacity + first) * kPanel, 0, sizeof(float) * padded * kPanel);
    add = true;
    subtract_pool(p, rows, first, count, patch_sums, scratch);
  }
  if (outer_started) subtract_pooled<Op>(p, rows, first, count, padded, capacity, patch_sums, add, scratch);
  return total;
}

}  // namespace
