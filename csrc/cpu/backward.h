// The backward of the dot and cosine forms: the weights W, and the products that turn them into gradients.
#pragma once

#include "cosine.h"
#include "dot.h"
#include "gradients.h"

namespace {

using namespace pacl;

template <class Op>
WeightSums weights(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                   int64_t panel_first, int64_t panel_last, Weights& to, const Sums& sums, bool add, Scratch& scratch) {
  const typename Op::Session session;
  if (p.form == Form::dot) return dot_weights<Op>(p, rows, first, last, texts, panel_first, panel_last, to, scratch);
  return cosine_weights<Op>(p, rows, first, last, texts, panel_first, panel_last, to, sums, add, scratch);
}

template <class Op>
void patches_product(const CompatibilityParams& p, const int64_t* row_start, int64_t next, const Rows& rows,
                     int64_t first, int64_t last, const Texts& texts, const Weights& w, const Sums& sums, bool add) {
  const typename Op::Session session;
  const int64_t inner = texts.padded / Op::kPair, panels = padded_dim(p.dim) / kPanel, count = last - first;
  const float* left = w.units + first * kPanel;
  Ahead ahead = ahead_of_left<Op>(left, rows.capacity, count, inner);
  // Prefetched earlier, the rows would be evicted again.
  const int64_t middle = ceil_div(panels, 3), late = panels - ceil_div(panels, 3);
  for (int64_t panel = 0; panel < panels; ++panel) {
    if (panel == middle && middle < late)  // prefetch for finish_patches
      ahead = Ahead(rows.units + first * kPanel, dim_units<Op>(p) / kPanel, count * kPanel * 4,
                    rows.capacity * kPanel * 4, product_steps<Op>(late - middle, count, inner));
    if (panel == late) ahead = ahead_of_rows(p, row_start, next, count, product_steps<Op>(panels - late, count, inner));
    product<Op>(left, rows.capacity, count, texts.row_units + panel * inner * kPanel, inner,
                sums.panels + (panel * sums.capacity + first - sums.first) * kPanel, add, &ahead, true);
  }
}

template <class Op>
void sum_rows([[maybe_unused]] const CompatibilityParams& p, [[maybe_unused]] Rows& rows, [[maybe_unused]] int64_t i) {
#if defined(PACL_PAIRS)
  if (Op::kPair == 1) return;
  const int64_t padding = i + 1 == rows.means ? round_up(rows.means, Op::kInner) - rows.means : 0;
  for (int64_t d = 0; d < padded_dim(p.dim); d += kPanel) {
    float* to = rows.row_units + (d / kPanel * (rows.capacity / 2) + rows.count / 2 + i) * kPanel;
    V sum[2]{};
    for (int64_t r = rows.image_begin[i]; r < rows.image_begin[i + 1]; ++r)
      for (int v = 0; v < 2; ++v)
        sum[v] = fma(load_dims<Op>(dims_at<Op>(rows.units, rows.capacity, r, d), v), rows.inv_norm[r], sum[v]);
    for (int v = 0; v < 2; ++v) {
      const V high = from_bfloat16(round_to_bfloat16(sum[v]));
      store(to + v * kLanes, interleave_bfloat16(high, sum[v] - high));
    }
    memset(to + kPanel, 0, sizeof(float) * padding * kPanel);
  }
#endif
}

template <class Op>
void means_product(const Rows& rows, const Texts& texts, const Weights& w, const Sums& sums, int64_t panel, bool add) {
  const typename Op::Session session;
  const int64_t inner = texts.padded / Op::kPair;
  product<Op>(w.units + row_of_mean<Op>(rows, 0) * kPanel, rows.capacity, rows.means,
              texts.row_units + panel * inner * kPanel, inner, sums.means + panel * kMeansCapacity * kPanel, add);
}

template <class Op>
void texts_product(const CompatibilityParams& p, const Rows& rows, const Texts& texts, const Weights& w, int64_t first,
                   int64_t last, int64_t panel_first, int64_t panel_last) {
  const typename Op::Session session;
  const int64_t inner = rows.count / Op::kPair + round_up(rows.means, Op::kInner),
                panel_floats = rows.capacity / Op::kPair * kPanel;
  const int64_t sum_floats = round_up(p.text_count, kPanel) * kPanel;
  if constexpr (Op::kMatrix) {
    for (int64_t panel = panel_first; panel < panel_last; ++panel)
      product<Op>(w.row_units + first * Op::kColumns * kPanel, texts.padded, (last - first) * Op::kColumns,
                  rows.row_units + panel * panel_floats, inner,
                  p.texts_sum + panel * sum_floats + (texts.first + first * Op::kColumns) * kPanel, true);
    return;
  }
  const int64_t steps = (last - first) * (panel_last - panel_first);
  for (int64_t at = 0; at < inner; at += Op::kInnerBlock) {
    const int64_t length = least(Op::kInnerBlock, inner - at), following = least(Op::kInnerBlock, inner - at - length);
    const int64_t text_panel = first * Op::kColumns / kPanel,
                  text_panels = ceil_div(last * Op::kColumns, kPanel) - text_panel;
    Ahead left(w.row_units + text_panel * panel_floats + (at + length) * kPanel, text_panels, following * kPanel * 4,
               panel_floats * 4, steps);
    Ahead right(rows.row_units + panel_first * panel_floats + (at + length) * kPanel, panel_last - panel_first,
                following * kPanel * 4, panel_floats * 4, steps);
    for (int64_t panel = panel_first; panel < panel_last; ++panel)
      for (int64_t k = first * Op::kColumns; k < last * Op::kColumns; k += Op::kColumns) {
        left.step();
        right.step();
        tile<Op, Op::kColumns, 1, kPanel>(w.row_units + k / kPanel * panel_floats + at * kPanel + k % kPanel,
                                          kPanel * kPanel, rows.row_units + panel * panel_floats + at * kPanel,
                                          p.texts_sum + panel * sum_floats + (texts.first + k) * kPanel, length, true);
      }
  }
}

}  // namespace
