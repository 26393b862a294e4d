// From the sums, through the norm, to the caller's gradients.
#pragma once

#include "rows.h"

namespace {

using namespace pacl;

// Writes part of a gradient. Pages that the system has just created are in the cache, where non-temporal stores take
// twice as long as plain ones. In older memory plain stores are the slower ones.
void write_gradient(void* to, int64_t offset, const void* from, int64_t bytes, bool fresh) {
  fresh ? (void)memcpy((char*)to + offset, from, bytes) : copy_non_temporal((char*)to + offset, from, bytes);
}

void write_row(void* base, int64_t offset, int64_t dim, Dtype dtype, const float* in, bool fresh) {
  uint16_t* half = (uint16_t*)base + offset;
  if (dtype == Dtype::float32)
    write_gradient(base, sizeof(float) * offset, in, sizeof(float) * dim, fresh);
  else if (dtype == Dtype::bfloat16)
    for (int64_t d = 0; d < dim; ++d) half[d] = to_bfloat16(in[d]);
  else
    for (int64_t d = 0; d < dim; ++d) half[d] = to_float16(in[d]);
}

// Writes ∂L/∂x = sum - (sum · x) x / |x|²: a step along x does not change its direction. `sums` is a row of panels, x
// is row `row` of `units`, inv_norm is 1 / |x| or 0, and the caller's row is x / range_scale. kMean adds inv_norm times
// `mean`, a row of Sums.means, to the sum. With p.raw it writes the sum. Returns |∂L/∂x|².
template <class Op, bool kMean = false>
float finish_row(const CompatibilityParams& p, const float* sums, int64_t sums_capacity, const float* units,
                 int64_t capacity, int64_t row, float inv_norm, float range_scale, int64_t dim, Dtype dtype, void* out,
                 int64_t out_offset, bool fresh, float* buffer, [[maybe_unused]] const float* mean = nullptr) {
  const int64_t dims = padded_dim(dim);
  if (inv_norm == 0.0f) {  // x has no direction, so its gradient is 0 whatever the sum is
    memset(buffer, 0, sizeof(float) * dims);
    write_row(out, out_offset, dim, dtype, buffer, fresh);
    return 0.0f;
  }
  const float inv_squared = p.raw ? 0.0f : inv_norm * inv_norm;
  const auto sum_of = [&](int64_t d, int v) {
    const V x = load(sums + d * sums_capacity + v * kLanes);
    return kMean ? fma(load(mean + d * kMeansCapacity + v * kLanes), inv_norm, x) : x;
  };
  V dot[2]{}, rest[2]{}, squares[2]{};
  for (int64_t d = 0; d < dims; d += kPanel) {
    const float* x = dims_at<Op>(units, capacity, row, d);
    for (int v = 0; v < 2; ++v) dot[v] = fma(load_dims<Op>(x, v), sum_of(d, v), dot[v]);
  }
  const float along = sum(dot[0] + dot[1]) * inv_squared;
#if defined(PACL_PAIRS)
  if constexpr (Op::kPair == 2) {
    for (int64_t d = 0; d < dims; d += kPanel) {
      const float* x = dims_at<Op>(units, capacity, row, d);
      for (int v = 0; v < 2; ++v) {
        const V result = fma(load_dims<Op>(x, v), -along, sum_of(d, v)) * range_scale;
        squares[v] = fma(result, result, squares[v]);
        const H half = round_to_bfloat16(result);
        memcpy((uint16_t*)buffer + d + v * kLanes, &half, sizeof half);
      }
    }
    write_gradient(out, sizeof(uint16_t) * out_offset, buffer, sizeof(uint16_t) * dim, fresh);
    return sum(squares[0] + squares[1]);
  }
#endif
  for (int64_t d = 0; d < dims; d += kPanel) {
    const float* x = dims_at<Op>(units, capacity, row, d);
    for (int v = 0; v < 2; ++v) {
      const V result = fma(load_dims<Op>(x, v), -along, sum_of(d, v));
      rest[v] = fma(result, load_dims<Op>(x, v), rest[v]);
      store(buffer + d + v * kLanes, result);
    }
  }
  // Project once more: the first projection leaves its rounding error along x, which is the whole result if D = 1. It
  // is far below the rounding of bfloat16 weights, whose D is at least 64.
  const float remainder = sum(rest[0] + rest[1]) * inv_squared;
  for (int64_t d = 0; d < dims; d += kPanel) {
    const float* x = dims_at<Op>(units, capacity, row, d);
    for (int v = 0; v < 2; ++v) {
      const V result = fma(load_dims<Op>(x, v), -remainder, load(buffer + d + v * kLanes)) * range_scale;
      squares[v] = fma(result, result, squares[v]);
      store(buffer + d + v * kLanes, result);
    }
  }
  write_row(out, out_offset, dim, dtype, buffer, fresh);
  return sum(squares[0] + squares[1]);
}

template <class Op>
double finish_patches(const CompatibilityParams& p, const Rows& rows, int64_t first, int64_t last, const Sums& sums,
                      float* buffer) {
  const auto finish = rows.means ? finish_row<Op, Op::kPair == 2> : finish_row<Op>;
  int64_t mean = mean_of_row(rows, first);
  double squares = 0;
  for (int64_t r = first; r < last; ++r) {
    if (rows.image[r] < 0) continue;
    if (rows.means && r >= rows.image_begin[mean + 1]) ++mean;
    squares += finish(p, sums.panels + (r - sums.first) * kPanel, sums.capacity, rows.units, rows.capacity, r,
                      rows.inv_norm[r], rows.range_scale[r], p.dim, p.dtype, p.grad_patches,
                      (first_patch(p, rows.image[r]) + rows.index[r]) * p.dim, p.fresh_gradient, buffer,
                      sums.means + mean * kPanel);
  }
  store_fence();
  return squares;
}

double finish_texts(const CompatibilityParams& p, int64_t first, int64_t last, float* buffer) {
  const int64_t dims = padded_dim(p.dim), capacity = round_up(p.text_count, kPanel);
  float* text = buffer + dims;  // panels of one row
  double squares = 0;
  for (int64_t k = first; k < last; ++k) {
    read_row(p.texts, k * p.text_strides.row, p.text_strides.dim, p.dim, p.dtype, text);
    memset(text + p.dim, 0, sizeof(float) * (dims - p.dim));
    const float* units = text;
    float range_scale;
    const float inv_norm = row_factor<Float32>(p, units, dims, text, range_scale);
    squares += finish_row<Float32>(p, p.texts_sum + k * kPanel, capacity, units, 1, 0, inv_norm, range_scale, p.dim,
                                   p.grad_texts_dtype, p.grad_texts, k * p.dim, false, buffer);
  }
  store_fence();
  return squares;
}

}  // namespace
