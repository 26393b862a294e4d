// The forward of a group of images: product, softmax over the patches, φ.
#pragma once

#include "cosine.h"
#include "kept.h"
#include "max.h"

namespace {

using namespace pacl;

// Adds rows [begin, count) of scratch.scores to the statistics of their images, for one panel of texts. Statistics are
// [images from `first`, columns].
template <class Op>
void add_scores(const CompatibilityParams& p, int64_t first, const Rows& rows, int64_t begin, int64_t count,
                const Texts& texts, int64_t panel, int64_t columns, int64_t column, Scratch& scratch) {
  const bool cosine = p.form == Form::cosine;
  for (int64_t end; begin < count; begin = end) {
    end = segment_end(rows, begin, count);
    if (rows.image[begin] < 0) continue;
    const int64_t at = (rows.image[begin] - first) * columns + column;
    Softmax running;
    for (int v = 0; v < 2; ++v) {
      running.largest[v] = load(scratch.largest + at + v * kLanes);
      running.sum[v] = load(scratch.sum + at + v * kLanes);
      running.weighted[v] = load(scratch.weighted + at + v * kLanes);
    }
    const auto add = omits_running_max(p) ? accumulate<false> : accumulate<true>;
    add(running, rows, begin, end, texts.inv_norm + panel * kPanel, p.temperature, scratch.scores,
        cosine ? scratch.attention : nullptr);
    for (int v = 0; v < 2; ++v) {
      store(scratch.largest + at + v * kLanes, running.largest[v]);
      store(scratch.sum + at + v * kLanes, running.sum[v]);
      store(scratch.weighted + at + v * kLanes, running.weighted[v]);
    }
    if (cosine)  // the image is complete, so its sums become φ
      cosine_forward<Op>(p, rows, end, texts, panel, running, scratch, scratch.weighted + at);
  }
}

#if defined(PACL_MATRIX_UNIT)
// Overlaps the product and its softmax: while the matrix unit computes one tile of scores, the vector units sum the
// previous one, a few rows after each step. It is for the dot form without a running maximum, and for rows that fit in
// one block of `inner`. Rows are `left_row` apart, their blocks of kPanel units `left_block` apart.
template <class Op>
void overlapped(const CompatibilityParams& p, int64_t first, const Rows& rows, const float* left, int64_t left_row,
                int64_t left_block, int64_t count, const Texts& texts, int64_t panel, int64_t columns, int64_t column,
                Ahead& ahead, Scratch& scratch) {
  constexpr int64_t kTall = 2 * kMatrixRows;
  const int64_t inner = dim_inner<Op>(p), steps = inner / kMatrixUnits;
  const float* right = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  const int64_t lines = ceil_div(2 * ahead.lines_per_step, steps), rows_per_step = ceil_div(kTall, steps);
  V norm[2];
  for (int v = 0; v < 2; ++v) norm[v] = load(texts.inv_norm + panel * kPanel + v * kLanes) * (kLog2e / p.temperature);
  for (int64_t row = 0, waiting = -1; row < count || waiting >= 0; row += kTall) {
    V sum[2]{}, weighted[2]{};
    int64_t r = waiting;
    const int64_t end = waiting + kTall;
    const auto add_rows = [&](int64_t some) {
      for (const int64_t last = least(r + some, end); r < last; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const V z = load(scratch.scores + r * kPanel + v * kLanes) * (norm[v] * rows.inv_norm[r]), e = exp2<false>(z);
          sum[v] += e;
          weighted[v] = fma(z, e, weighted[v]);
        }
    };
    if (row < count) {
      matrix_begin<2>(nullptr, false);
      if (waiting >= 0)
        matrix_add<2>(left + row * left_row, left_row, left_block, right, inner, [&] {
          ahead.fetch(lines);
          add_rows(rows_per_step);
        });
      else
        matrix_add<2>(left + row * left_row, left_row, left_block, right, inner, [&] { ahead.fetch(lines); });
      matrix_end<2>(scratch.scores + row * kPanel);
    }
    if (waiting >= 0) {
      add_rows(kTall);
      const int64_t at = (rows.image[waiting] - first) * columns + column;
      for (int v = 0; v < 2; ++v) {
        store(scratch.sum + at + v * kLanes, load(scratch.sum + at + v * kLanes) + sum[v]);
        store(scratch.weighted + at + v * kLanes, load(scratch.weighted + at + v * kLanes) + weighted[v]);
      }
    }
    waiting = -1;
    if (row >= count) continue;
    if (row + kTall <= count && rows.image[row] == rows.image[row + kTall - 1])  // one image, hence no padding
      waiting = row;
    else
      add_scores<Op>(p, first, rows, row, least(row + kTall, count), texts, panel, columns, column, scratch);
  }
}

// Returns rows [row, row + count) in the caller's memory if whole tiles can be read there, otherwise null.
template <class Op>
const float* rows_in_place(const CompatibilityParams& p, const int64_t* row_start, int64_t row, int64_t count,
                           Rows& rows) {
  constexpr int64_t kTall = 2 * kMatrixRows;
  if (p.mask || !rows_are_even(p) || p.dim != Op::kPair * dim_units<Op>(p) || p.patch_strides.row % Op::kPair ||
      row + round_up(count, kTall) > all_patches(p))
    return nullptr;
  const int64_t stride = p.patch_strides.row / Op::kPair;
  const float* left = (const float*)((const char*)p.patches + row * stride * 4);
  int64_t image = image_of_row(p, row_start, row);
  for (int64_t r = 0; r < count; ++r) {
    while (row + r >= row_start[image + 1]) ++image;
    rows.image[r] = (int32_t)image;
    rows.inv_norm[r] = inverse_norm<Op>(left + r * stride, dim_units<Op>(p));
    if (is_long<Op>(left + r * stride, dim_units<Op>(p), rows.inv_norm[r])) return nullptr;
  }
  return left;
}
#endif

template <class Op>
void forward(const CompatibilityParams& p, const int64_t* row_start, int64_t first, int64_t last, const Texts& texts,
             int64_t panel_first, int64_t panel_last, int64_t next, Scratch& scratch) {
  const typename Op::Session session;
  if (p.form == Form::max)
    return max_forward<Op>(p, row_start, first, last, texts, panel_first, panel_last, next, scratch);
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), columns = (panel_last - panel_first) * kPanel;
  const bool cosine = p.form == Form::cosine, no_running_max = omits_running_max(p);
  Rows& rows = scratch.rows;
  for (int64_t i = 0; i < (last - first) * columns; ++i) {
    scratch.largest[i] = kBelowEveryScore;
    scratch.sum[i] = scratch.weighted[i] = 0.0f;
  }
  for (int64_t row = row_start[first]; row < row_start[last]; row += rows.capacity) {
    const int64_t count = least(rows.capacity, row_start[last] - row);
    const float* in_place = nullptr;
#if defined(PACL_MATRIX_UNIT)
    const bool overlaps = Op::kMatrix && !cosine && no_running_max && inner <= Op::kInnerBlock;
    if (overlaps) in_place = rows_in_place<Op>(p, row_start, row, count, rows);
    const float* left = in_place ? in_place : rows.units;
    const int64_t left_row = in_place ? p.patch_strides.row / Op::kPair : kPanel;
    const int64_t left_block = in_place ? kPanel : rows.capacity * kPanel;
#endif
    if (!in_place) pack_rows<Op>(p, row_start, row, row + count, rows, 0, scratch.row);
    const int64_t following = row + count < row_start[last] ? row + count : row_start[least(next, p.images)];
    Ahead ahead = ahead_of_rows(p, row_start, following, rows.capacity,
                                product_steps<Op>(panel_last - panel_first, count, inner));
    if (cosine && !pools_patches<Op>(p, segment_end(rows, 0, count))) {
      gram<Op>(p, rows, 0, count, scratch, rows.capacity);
      fold_symmetric(scratch.gram, rows.capacity, count, rows.inv_norm);
      split_gram<Op, true>(scratch, rows.capacity, count);
    }
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t column = (panel - panel_first) * kPanel;
#if defined(PACL_MATRIX_UNIT)
      if (overlaps) {
        overlapped<Op>(p, first, rows, left, left_row, left_block, count, texts, panel, columns, column, ahead,
                       scratch);
        continue;
      }
#endif
      product<Op>(rows.units, rows.capacity, count, texts.transposed + panel * units * kPanel, inner, scratch.scores,
                  false, &ahead);
      if (p.score_blocks)
        visit_scores(p, kPanel, texts.first / kPanel + panel, cosine ? p.score_blocks->image_row[first] : row,
                     cosine ? segment_end(rows, 0, count) : count, [&](float* to, int64_t done, int64_t some) {
                       memcpy(to, scratch.scores + done * kPanel, sizeof(float) * some * kPanel);
                     });
      add_scores<Op>(p, first, rows, 0, count, texts, panel, columns, column, scratch);
    }
  }
  for (int64_t image = first; image < last; ++image)
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t at = (image - first) * columns + (panel - panel_first) * kPanel, k = panel * kPanel;
      Softmax sums;
      for (int v = 0; v < 2; ++v) {
        sums.largest[v] = load(scratch.largest + at + v * kLanes);
        sums.sum[v] = load(scratch.sum + at + v * kLanes);
        sums.weighted[v] = load(scratch.weighted + at + v * kLanes);
      }
      V phi[2], state[2];
      dot_from_softmax(p, sums, phi, state);
      for (int v = 0; cosine && v < 2; ++v) phi[v] = select(sums.sum[v] == V{}, V{}, sums.weighted[v]);
      store_lanes(p.phi + image * p.text_count + texts.first + k, phi, texts.count - k);
      store_lanes(p.state + image * p.text_count + texts.first + k, state, texts.count - k);
    }
}

}  // namespace
