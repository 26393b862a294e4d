// The fused functions, written once on the vectors of simd.h and compiled once per instruction set.
// No std:: templates and no shared inline functions: the linker could keep an AVX-512 copy of them for everyone.

#include "argmax.h"
#include "cosine.h"
#include "max.h"

namespace {

using namespace pacl;

// Adds to the statistics of the images that rows [begin, count) of scratch.scores belong to, for one panel of texts.
// Statistics are [images from `first`, columns].
template <class Op>
void add_scores(const ScoreParams& p, int64_t first, const Rows& rows, int64_t begin, int64_t count, const Texts& texts,
                int64_t panel, int64_t columns, int64_t column, Scratch& scratch) {
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
    (is_bounded(p) ? accumulate<true> : accumulate<false>)(running, rows, begin, end, texts.inv_norm + panel * kPanel,
                                                           p.temperature, scratch.scores,
                                                           cosine ? scratch.attention : nullptr);
    for (int v = 0; v < 2; ++v) {
      store(scratch.largest + at + v * kLanes, running.largest[v]);
      store(scratch.sum + at + v * kLanes, running.sum[v]);
      store(scratch.weighted + at + v * kLanes, running.weighted[v]);
    }
    if (cosine)  // the image is whole: the sums become φ
      cosine_of_pooled<Op>(p, rows, end, texts, panel, running, scratch, scratch.weighted + at);
  }
}

#if defined(PACL_MATRIX_UNIT)
// The product and its softmax at the same time: while the matrix unit makes one tile of scores, the vector units sum up
// the one before, a few rows after each step. For the dot form, |s / τ| bounded, and rows that fit one block of `inner`;
// they are `left_row` apart, their blocks of kPanel units `left_block`.
template <class Op>
void overlapped(const ScoreParams& p, int64_t first, const Rows& rows, const float* left, int64_t left_row,
                int64_t left_block, int64_t count, const Texts& texts, int64_t panel, int64_t columns, int64_t column,
                Ahead& ahead, Scratch& scratch) {
  constexpr int64_t kTall = 2 * kMatrixRows;
  const int64_t inner = dim_inner<Op>(p), steps = inner / kMatrixUnits;
  const float* right = texts.transposed + panel * dim_units<Op>(p) * kPanel;
  const int64_t lines = ceil_div(2 * ahead.lines_per_step, steps), rows_per_step = ceil_div(kTall, steps);
  V norm[2];
  for (int v = 0; v < 2; ++v)
    norm[v] = load(texts.inv_norm + panel * kPanel + v * kLanes) * (kLog2e / p.temperature);
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
    if (row + kTall <= count && rows.image[row] == rows.image[row + kTall - 1])  // of one image, hence no padding
      waiting = row;
    else
      add_scores<Op>(p, first, rows, row, least(row + kTall, count), texts, panel, columns, column, scratch);
  }
}

// Rows [row, row + count) where the caller has them, if whole tiles of them may be read there; otherwise null.
template <class Op>
const float* rows_in_place(const ScoreParams& p, int64_t row, int64_t count, Rows& rows) {
  constexpr int64_t kTall = 2 * kMatrixRows;
  if (p.mask || !rows_are_even(p) || p.dim != Op::kPair * dim_units<Op>(p) || p.patch_stride_row % Op::kPair ||
      row + round_up(count, kTall) > p.images * p.patches_per_image)
    return nullptr;
  const int64_t stride = p.patch_stride_row / Op::kPair;
  const float* left = (const float*)((const char*)p.patches + row * stride * 4);
  int64_t image = row / p.patches_per_image, n = row - image * p.patches_per_image;
  for (int64_t r = 0; r < count; ++r, ++n) {
    if (n == p.patches_per_image) ++image, n = 0;
    rows.image[r] = (int32_t)image;
    rows.inv_norm[r] = inverse_norm<Op>(left + r * stride, dim_units<Op>(p));
    if (is_long<Op>(left + r * stride, dim_units<Op>(p), rows.inv_norm[r])) return nullptr;
  }
  return left;
}
#endif

template <class Op>
void forward(const ScoreParams& p, const int64_t* row_start, int64_t first, int64_t last, const Texts& texts,
             int64_t panel_first, int64_t panel_last, int64_t next, Scratch& scratch) {
  const typename Op::Session session;
  if (p.form == Form::max)
    return forward_max<Op>(p, row_start, first, last, texts, panel_first, panel_last, next, scratch);
  const int64_t units = dim_units<Op>(p), inner = dim_inner<Op>(p), columns = (panel_last - panel_first) * kPanel;
  const bool cosine = p.form == Form::cosine, bounded = is_bounded(p);
  Rows& rows = scratch.rows;
  for (int64_t i = 0; i < (last - first) * columns; ++i) {
    scratch.largest[i] = kBelowEveryScore;
    scratch.sum[i] = scratch.weighted[i] = 0.0f;
  }
  for (int64_t row = row_start[first]; row < row_start[last]; row += rows.capacity) {
    const int64_t count = least(rows.capacity, row_start[last] - row);
    const float* in_place = nullptr;
#if defined(PACL_MATRIX_UNIT)
    const bool overlaps = Op::kMatrix && !cosine && bounded && inner <= Op::kInnerBlock;
    if (overlaps) in_place = rows_in_place<Op>(p, row, count, rows);
    const float* left = in_place ? in_place : rows.units;
    const int64_t left_row = in_place ? p.patch_stride_row / Op::kPair : kPanel;
    const int64_t left_block = in_place ? kPanel : rows.capacity * kPanel;
#endif
    if (!in_place) pack_rows<Op>(p, row_start, row, row + count, rows, 0, scratch.row);
    const int64_t following = row + count < row_start[last] ? row + count : row_start[least(next, p.images)];
    Ahead ahead =
        ahead_of_rows(p, row_start, following, rows.capacity, product_steps<Op>(panel_last - panel_first, count, inner));
    if (cosine && !pools<Op>(p, segment_end(rows, 0, count))) {
      gram<Op>(p, rows, 0, count, scratch, rows.capacity);
      fold_symmetric(scratch.gram, rows.capacity, count, rows.inv_norm);
      split_gram<Op, true>(scratch, rows.capacity, count);
    }
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t column = (panel - panel_first) * kPanel;
#if defined(PACL_MATRIX_UNIT)
      if (overlaps) {
        overlapped<Op>(p, first, rows, left, left_row, left_block, count, texts, panel, columns, column, ahead, scratch);
        continue;
      }
#endif
      product<Op>(rows.units, rows.capacity, count, texts.transposed + panel * units * kPanel, inner, scratch.scores,
                  false, &ahead);
      add_scores<Op>(p, first, rows, 0, count, texts, panel, columns, column, scratch);
    }
  }
  for (int64_t image = first; image < last; ++image)
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t at = (image - first) * columns + (panel - panel_first) * kPanel, k = panel * kPanel;
      V phi[2], lse[2];
      for (int v = 0; v < 2; ++v) {
        const V total = load(scratch.sum + at + v * kLanes), weighted = load(scratch.weighted + at + v * kLanes);
        const V largest = load(scratch.largest + at + v * kLanes);
        const I empty = total == V{};  // no valid patch
        phi[v] = cosine ? weighted : bounded ? weighted / total * (kLn2 * p.temperature) : largest + weighted / total;
        phi[v] = select(empty, V{}, phi[v]);
        lse[v] = logarithm(total);
        if (!bounded) lse[v] += (largest - phi[v]) / p.temperature;
        lse[v] = select(empty, V{}, lse[v]);
      }
      store_lanes(p.phi + image * p.texts_count + texts.first + k, phi, texts.count - k);
      store_lanes(p.lse + image * p.texts_count + texts.first + k, lse, texts.count - k);
    }
}

template <class Op>
WeightSums weights(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
               int64_t panel_first, int64_t panel_last, Weights& to, const Sums& sums, bool add, Scratch& scratch) {
  const typename Op::Session session;
  if (p.form == Form::dot) return weights_dot<Op>(p, rows, first, last, texts, panel_first, panel_last, to, scratch);
  return weights_cosine<Op>(p, rows, first, last, texts, panel_first, panel_last, to, sums, add, scratch);
}

template <class Op>
void patches_product(const ScoreParams& p, const int64_t* row_start, int64_t next, const Rows& rows, int64_t first,
                     int64_t last, const Texts& texts, const Weights& w, const Sums& sums, bool add) {
  const typename Op::Session session;
  const int64_t inner = texts.padded / Op::kPair, panels = padded_dim(p.dim) / kPanel, count = last - first;
  const float* left = w.units + first * kPanel;
  Ahead ahead = ahead_of_left<Op>(left, rows.capacity, count, inner);
  // Fetched earlier, the rows would be evicted again.
  const int64_t middle = ceil_div(panels, 3), late = panels - ceil_div(panels, 3);
  for (int64_t panel = 0; panel < panels; ++panel) {
    if (panel == middle && middle < late)  // for finish_patches
      ahead = Ahead(rows.units + first * kPanel, dim_units<Op>(p) / kPanel, count * kPanel * 4,
                    rows.capacity * kPanel * 4, product_steps<Op>(late - middle, count, inner));
    if (panel == late) ahead = ahead_of_rows(p, row_start, next, count, product_steps<Op>(panels - late, count, inner));
    product<Op>(left, rows.capacity, count, texts.row_units + panel * inner * kPanel, inner,
                sums.panels + (panel * sums.capacity + first - sums.first) * kPanel, add, &ahead, true);
  }
}

template <class Op>
void sum_rows([[maybe_unused]] const ScoreParams& p, [[maybe_unused]] Rows& rows, [[maybe_unused]] int64_t i) {
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
void means_product(const Rows& rows, const Texts& texts, const Weights& w, const Sums& sums, int64_t panel,
                   bool add) {
  const typename Op::Session session;
  const int64_t inner = texts.padded / Op::kPair;
  product<Op>(w.units + row_of_mean<Op>(rows, 0) * kPanel, rows.capacity, rows.means,
              texts.row_units + panel * inner * kPanel, inner,
              sums.means + panel * kMeansCapacity * kPanel, add);
}

template <class Op>
void texts_product(const ScoreParams& p, const Rows& rows, const Texts& texts, const Weights& w, int64_t first,
                   int64_t last, int64_t panel_first, int64_t panel_last) {
  const typename Op::Session session;
  const int64_t inner = rows.count / Op::kPair + round_up(rows.means, Op::kInner),
                panel_floats = rows.capacity / Op::kPair * kPanel;
  const int64_t sum_floats = round_up(p.texts_count, kPanel) * kPanel;
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

template <class Op>
double multiply_adds(int64_t repeats) {
#if defined(PACL_MATRIX_UNIT)
  if constexpr (Op::kMatrix) {
    const MatrixUnit session;
    matrix_zero<4>();  // operands that change would cost up to a quarter of the clock
    matrix_zero<5>();
    for (int64_t k = 0; k < repeats; ++k) {
      matrix_multiply_add<0, 4, 5>();
      matrix_multiply_add<1, 4, 5>();
      matrix_multiply_add<2, 4, 5>();
      matrix_multiply_add<3, 4, 5>();
    }
    return 2.0 * 4 * kMatrixRows * kMatrixUnits * 2 * kMatrixUnits * repeats;
  }
#endif
  constexpr int kChains = 2 * (kTileRows < 12 ? kTileRows : 12);
  V sums[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(1.0f + i);
  const V x = broadcast(0.5f), y = broadcast(0.25f);
  for (int64_t k = 0; k < repeats; ++k) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = Op::multiply_add(y, x, sums[i]);
  }
  V total{};
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) total += sums[i];
  volatile float keep = sum(total);  // or the compiler drops the loop
  (void)keep;
  return 2.0 * Op::kPair * kLanes * kChains * repeats;
}

template <class Op>
constexpr Kernels table() {
  return {kPanel,
          Op::kMatrix ? 2 * Op::kRows : Op::kRows,
          Op::kColumns,
          Op::kPair,
          Op::kInner,
          Op::kMatrix,
          pack_rows<Op>,
          pack_texts<Op>,
          forward<Op>,
          weights<Op>,
          patches_product<Op>,
          sum_rows<Op>,
          means_product<Op>,
          texts_product<Op>,
          finish_patches<Op>,
          finish_texts,
          multiply_adds<Op>,
          max_pack_texts,
          max_sort,
          max_patches,
          max_texts,
          max_finish_texts,
          upsample_argmax};
}

}  // namespace

namespace pacl {
namespace PACL_ISA {
extern const Kernels kernels, pair_kernels;
#if defined(PACL_PAIRS)
const Kernels pair_kernels = table<BFloat16>();
#else
const Kernels kernels = table<Float32>();
#endif
}  // namespace PACL_ISA
}  // namespace pacl
