// The cosine form from the pooled patch v = Σ a p̂: in float32 where that is cheaper than G, in double if patches
// cancel. See cosine.h.
#pragma once

#include "cosine_cost.h"
#include "softmax.h"

namespace {

using namespace pacl;

// Returns true if r² of any text is much smaller than Σ e², its value for patches of random directions. r² then
// consists mostly of the rounding error of G.
inline bool cancels(const Scratch& scratch, const float* inv_norm, int64_t count, const float* text_norm,
                    const V squared[2]) {
  bool any = false;
  for (int v = 0; v < 2; ++v) {
    V incoherent{};
    for (int64_t r = 0; r < count; ++r) {
      const V e = load(scratch.attention + r * kPanel + v * kLanes);
      incoherent = inv_norm[r] > 0 ? fma(e, e, incoherent) : incoherent;
    }
    const I below = (squared[v] < incoherent * 0.25f) & (load(text_norm + v * kLanes) > V{});  // texts, not padding
    for (int i = 0; i < kLanes; ++i) any |= below[i] != 0;
  }
  return any;
}

inline V square_root(V x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i] < 0 ? 0.0f : x[i]);  // NaN stays NaN
  return x;
}

// Returns half `half` of each lane's unit as float32.
template <class Op>
inline V element(V unit, [[maybe_unused]] int half) {
  if (Op::kPair == 1) return unit;
  return from_bits(half ? bits(unit) & (int32_t)0xFFFF0000 : bits(unit) << 16);
}

typedef double Wide __attribute__((vector_size(8 * kLanes)));
inline void add_product(Wide& sum, V a, V b) {
  sum += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
}

// Sets scratch.direction [D, panel] to t̂ - slope v, with v in scratch.pooled_patch, or to t̂ if `slope` is null.
template <class Op>
void set_direction(const CompatibilityParams& p, const Texts& texts, int64_t panel, const V* slope, Scratch& scratch) {
  const float* text = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  for (int64_t d = 0; d < dim_inner<Op>(p) * Op::kPair; ++d)
    for (int v = 0; v < 2; ++v) {
      const int64_t i = d * kPanel + v * kLanes;
      V t = element<Op>(load(text + d / Op::kPair * kPanel + v * kLanes), d % Op::kPair);
      t *= load(texts.inv_norm + panel * kPanel + v * kLanes);
      store(scratch.direction + i, slope ? fma(-slope[v], load(scratch.pooled_patch + i), t) : t);
    }
}

// Computes `to` = p̂ · scratch.direction for the `count` rows from `first` on.
template <class Op>
void scores_in_double(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count, Scratch& scratch,
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

// Computes scratch.pooled_patch [D, panel] = Σ e p̂, with e = exp((s - largest) / τ), for patches that cancel. This is
// rare, so the code is short rather than fast: double precision, whose rounding is small beside the result.
// scratch.scores becomes s. scratch.attention and `sums` are recomputed from it, or τ would divide the difference of
// two roundings of s. scratch.gram_attention is overwritten.
template <class Op>
void pool_patches_in_double(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                            const Texts& texts, int64_t panel, Softmax& sums, Scratch& scratch) {
  set_direction<Op>(p, texts, panel, nullptr, scratch);
  scores_in_double<Op>(p, rows, first, count, scratch, scratch.scores);
  for (int v = 0; v < 2; ++v) {
    V largest = omits_running_max(p) ? V{} : broadcast(kBelowEveryScore);
    for (int64_t r = 0; !omits_running_max(p) && r < count; ++r)
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
      store(scratch.gram_attention + i, __builtin_convertvector(exact - __builtin_convertvector(e, Wide), V));
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
        add_product(sum, x, load(scratch.gram_attention + i));
      }
      store(scratch.pooled_patch + d * kPanel + v * kLanes, __builtin_convertvector(sum, V));
    }
  }
}

// Returns true if pooling is cheaper than computing G. It is float32 only: rounding the attention or the pooled patch
// to bfloat16 would show in φ. See select_cosine_kernels for calls in bfloat16.
template <class Op>
inline bool pools_patches(const CompatibilityParams& p, int64_t count) {
  const CosineCost cost(p, count);
  return Op::kPair == 1 && cost.pooled() < cost.gram(1, 1);
}

// Computes scratch.pooled_patch [D, panel] = Σ e p̂ in float32. Overwrites scratch.scaled.
inline void pool_patches(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                         Scratch& scratch) {
  const int64_t padded = round_up(count, 4);
  for (int64_t i = 0; i < count * kPanel; i += kLanes)
    store(scratch.scaled + i, load(scratch.attention + i) * rows.inv_norm[first + i / kPanel]);
  memset(scratch.scaled + count * kPanel, 0, sizeof(float) * (padded - count) * kPanel);
  for (int64_t at = 0; at < padded; at += Float32::kInnerBlock)
    for (int64_t d = 0; d < padded_dim(p.dim); d += kTileColumns)
      tile<Float32, kTileColumns, 1, kPanel>(
          rows.units + (d / kPanel * rows.capacity + first + at) * kPanel + d % kPanel, kPanel * kPanel,
          scratch.scaled + at * kPanel, scratch.pooled_patch + d * kPanel, least(Float32::kInnerBlock, padded - at),
          at > 0);
}

// Computes the score Σ e p̂ · t̂ and the squared norm of scratch.pooled_patch.
template <class Op>
void score_and_squared_norm(const CompatibilityParams& p, const Texts& texts, int64_t panel, const Scratch& scratch,
                            V along[2], V squared[2]) {
  const float* text = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  for (int v = 0; v < 2; ++v) {
    Wide dot{}, norm{};
    for (int64_t d = 0; d < dim_inner<Op>(p) * Op::kPair; ++d) {
      const V x = load(scratch.pooled_patch + d * kPanel + v * kLanes);
      add_product(dot, x, element<Op>(load(text + d / Op::kPair * kPanel + v * kLanes), d % Op::kPair));
      add_product(norm, x, x);
    }
    along[v] = __builtin_convertvector(dot, V) * load(texts.inv_norm + panel * kPanel + v * kLanes);
    squared[v] = __builtin_convertvector(norm, V);
  }
}

// Computes scratch.gram_attention = p̂ · scratch.direction in float32 for the `count` rows from `first` on.
inline void scores_of_direction(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                                Scratch& scratch) {
  product<Float32>(rows.units + first * kPanel, rows.capacity, count, scratch.direction, dim_inner<Float32>(p),
                   scratch.gram_attention, false);
  for (int64_t i = 0; i < count * kPanel; i += kLanes)
    store(scratch.gram_attention + i, load(scratch.gram_attention + i) * rows.inv_norm[first + i / kPanel]);
}

// Computes sums -= scratch.scaled v / ‖p‖ for the `count` rows from `first` on. This is C P̂ for one panel of texts
// whose pooled patches v are in scratch.pooled_patch.
inline void subtract_pooled_patch(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t count,
                                  const Sums& sums, Scratch& scratch) {
  for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel) {
    for (int64_t i = 0; i < kPanel; i += kLanes)
      for (int64_t k = 0; k < kPanel; k += kLanes)
        transpose(scratch.pooled_patch + (panel * kPanel + i) * kPanel + k, kPanel,
                  scratch.attention_t + k * kPanel + i, kPanel);
    product<Float32>(scratch.scaled, 0, count, scratch.attention_t, kPanel, scratch.gram_attention, false);
    float* to = sums.panels + (panel * sums.capacity + first) * kPanel;
    for (int64_t i = 0; i < count * kPanel; i += kLanes)
      store(to + i, fma(load(scratch.gram_attention + i), -rows.inv_norm[first + i / kPanel], load(to + i)));
  }
}

}  // namespace
