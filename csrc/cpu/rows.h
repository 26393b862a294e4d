// The packing of the caller's tensors into panels.
#pragma once

#include "../constants.h"
#include "half.h"
#include "product.h"

namespace {

using namespace pacl;

void read_row(const void* base, int64_t offset, int64_t stride, int64_t dim, Dtype dtype, float* out) {
  const uint16_t* half = (const uint16_t*)base + offset;
  if (dtype == Dtype::float32) {
    const float* in = (const float*)base + offset;
    if (stride == 1)
      memcpy(out, in, sizeof(float) * dim);
    else
      for (int64_t d = 0; d < dim; ++d) out[d] = in[d * stride];
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t d = 0; d < dim; ++d) out[d] = from_bfloat16(half[d * stride]);
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = from_float16(half[d * stride]);
  }
}

inline int64_t padded_dim(int64_t dim) { return round_up(dim, kPanel); }

// Returns one row as units, zero-padded to `padded` units: the caller's own memory if it has that form, otherwise
// `buffer`.
template <class Op>
const float* row_units_at(const void* base, int64_t offset, int64_t stride, int64_t dim, Dtype dtype, int64_t padded,
                          float* buffer) {
  const uint16_t* half = (const uint16_t*)base + offset;
  const bool whole = stride == 1 && dim == padded * Op::kPair;
  if (Op::kPair == 1) {
    if (whole && dtype == Dtype::float32) return (const float*)base + offset;
    read_row(base, offset, stride, dim, dtype, buffer);
  } else {  // the units are the caller's bits
    if (whole) return (const float*)half;
    for (int64_t d = 0; d < dim; ++d) ((uint16_t*)buffer)[d] = half[d * stride];
  }
  memset((char*)buffer + dim * 4 / Op::kPair, 0, (padded * Op::kPair - dim) * 4 / Op::kPair);
  return buffer;
}

template <class Op>
float inverse_norm(const float* units, int64_t padded) {
  V sums[4]{};  // independent chains: an FMA takes four cycles
  for (int64_t i = 0; i < padded; i += kPanel) {
    for (int v = 0; v < 2; ++v) {
      V x = load(units + i + v * kLanes);
      if (Op::kPair == 1) {
        sums[v] = fma(x, x, sums[v]);
      } else {
        V low = from_bits(bits(x) << 16), high = from_bits(bits(x) & (int32_t)0xFFFF0000);
        sums[2 * v] = fma(low, low, sums[2 * v]);
        sums[2 * v + 1] = fma(high, high, sums[2 * v + 1]);
      }
    }
  }
  float squared = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return squared < kMinNormSquared ? 0.0f : 1.0f / __builtin_sqrtf(squared);
}

template <class Op>
__attribute__((noinline)) float largest_element(const float* units, int64_t padded) {
  constexpr int32_t kMagnitude = 0x7FFFFFFF, kHigh = 0x7FFF0000;
  V largest{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const I x = bits(load(units + i));
    largest = maximum(from_bits(x & (Op::kPair == 1 ? kMagnitude : kHigh)), largest);
    if (Op::kPair == 2) largest = maximum(from_bits((x << 16) & kHigh), largest);
  }
  float most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;
  return most;
}

constexpr float kLongInverse = 0x1p-30f;  // a row is long if its 1 / norm is below this

template <class Op>
bool is_long(const float* units, int64_t padded, float inv_norm) {
  return inv_norm < kLongInverse && largest_element<Op>(units, padded) > 1.0f;
}

// Returns the inverse norm of the row at `units`. A long row, whose squares or products might overflow, is first scaled
// by a power of two, `range_scale`, into `buffer`, to which `units` then points. Its gradient is the scaled row's times
// range_scale. A row with an infinite element has no known direction and gives NaN.
template <class Op>
float inverse_norm_in_range(const float*& units, int64_t padded, float* buffer, float& range_scale) {
  const float inv_norm = inverse_norm<Op>(units, padded);
  range_scale = 1.0f;
  if (!is_long<Op>(units, padded, inv_norm)) return inv_norm;
  const uint32_t exponent = float_bits(largest_element<Op>(units, padded)) >> 23;
  if (exponent == 255) return __builtin_nanf("");
  range_scale = float_from_bits((255 - exponent) << 23);  // brings the largest element to between 2 and 4
  for (int64_t i = 0; i < padded * Op::kPair; ++i)
    if (Op::kPair == 1)
      buffer[i] = units[i] * range_scale;
    else
      ((uint16_t*)buffer)[i] = to_bfloat16(from_bfloat16(((const uint16_t*)units)[i]) * range_scale);
  units = buffer;
  return inverse_norm<Op>(units, padded);
}

// Returns 1 for rows that are used as they are, and otherwise what inverse_norm_in_range does.
template <class Op>
float row_factor(const CompatibilityParams& p, const float*& units, int64_t padded, float* buffer, float& range_scale) {
  range_scale = 1.0f;
  return p.raw ? 1.0f : inverse_norm_in_range<Op>(units, padded, buffer, range_scale);
}

// Returns the units of D, padded to whole panels.
template <class Op>
inline int64_t dim_units(const CompatibilityParams& p) {
  return round_up(ceil_div(p.dim, Op::kPair), kPanel);
}

// Returns the inner length of a product over D: its units, rounded up to whole steps.
template <class Op>
inline int64_t dim_inner(const CompatibilityParams& p) {
  return round_up(ceil_div(p.dim, Op::kPair), Op::kInner);
}

// Interleaves two rows of bfloat16 into one row of units, the first row in the low halves; its panels are
// `panels_apart` floats apart.
inline void interleave([[maybe_unused]] const float* even_units, [[maybe_unused]] const float* odd_units,
                       [[maybe_unused]] int64_t dim, [[maybe_unused]] float* out,
                       [[maybe_unused]] int64_t panels_apart) {
#if defined(PACL_PAIRS)
  for (int64_t d = 0; d < dim; d += kPanel, out += panels_apart)
    for (int v = 0; v < 2; ++v) {
      H even, odd;
      memcpy(&even, (const uint16_t*)even_units + d + v * kLanes, sizeof even);
      memcpy(&odd, (const uint16_t*)odd_units + d + v * kLanes, sizeof odd);
      store(out + v * kLanes, from_bits(zero_extend(even) | zero_extend(odd) << 16));
    }
#endif
}

template <class Op>
void pack_rows(const CompatibilityParams& p, const int64_t* row_start, int64_t first, int64_t last, Rows& to,
               int64_t at, float* row) {
  const int64_t units = dim_units<Op>(p);
  int64_t image = image_of_row(p, row_start, first);
  int64_t n = -1, place = row_start[image] - 1;  // the last patch visited, and its row
  int64_t patches = patches_of(p, image);
  const float* even = row;
  for (int64_t r = first; r < last; ++r, ++at) {
    while (image < p.images && r >= row_start[image + 1]) {
      ++image;
      n = -1;
      place = image < p.images ? row_start[image] - 1 : 0;
      patches = image < p.images ? patches_of(p, image) : 0;
    }
    if (image < p.images) {
      const uint8_t* mask = image_mask(p, image);
      while (place < r && n < patches) {
        ++n;
        if (n < patches && (!mask || mask[n * p.mask_strides.row])) ++place;
      }
    }
    const bool padding = image >= p.images || n >= patches;
    float* buffer = row + (Op::kPair == 2 && (at & 1) ? units : 0);
    if (padding) memset(buffer, 0, sizeof(float) * units);
    const float* source = padding ? buffer
                                  : row_units_at<Op>(p.patches, image_offset(p, image) + n * p.patch_strides.row,
                                                     p.patch_strides.dim, p.dim, p.dtype, units, buffer);
    to.image[at] = padding ? -1 : (int32_t)image;
    to.index[at] = padding ? -1 : (int32_t)n;
    to.range_scale[at] = 1.0f;
    to.inv_norm[at] = padding ? 0.0f : row_factor<Op>(p, source, units, buffer, to.range_scale[at]);
    float* out = to.units + at * kPanel;
    const int64_t apart = to.capacity * kPanel;
    for (int64_t u = 0; u < units; u += kPanel, out += apart)
      for (int v = 0; v < 2; ++v) store(out + v * kLanes, load(source + u + v * kLanes));
    if (Op::kPair == 2 && to.row_units && (at & 1))
      interleave(even, source, padded_dim(p.dim), to.row_units + at / 2 * kPanel, to.capacity / 2 * kPanel);
    even = source;
  }
}

template <class Op>
void pack_texts(const CompatibilityParams& p, Texts& to, int64_t panel, float* row) {
  const int64_t units = dim_units<Op>(p), dims = padded_dim(p.dim);
  float* transposed = to.transposed + panel * units * kPanel;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t k = panel * kPanel + i;
    float* buffer = row + i * units;
    if (k < to.count) {
      const float* source = row_units_at<Op>(p.texts, (to.first + k) * p.text_strides.row, p.text_strides.dim, p.dim,
                                             p.dtype, units, buffer);
      float range_scale;
      to.inv_norm[k] = row_factor<Op>(p, source, units, buffer, range_scale);
      if (source != buffer) memcpy(buffer, source, sizeof(float) * units);
    } else {
      memset(buffer, 0, sizeof(float) * units);
      to.inv_norm[k] = 0.0f;
    }
    if (!to.row_units) continue;
    if (Op::kPair == 1)
      for (int64_t d = 0; d < dims; d += kPanel)
        memcpy(to.row_units + (d / kPanel * to.padded + k) * kPanel, buffer + d, sizeof(float) * kPanel);
    else if (i & 1)
      interleave(buffer - units, buffer, dims, to.row_units + k / 2 * kPanel, to.padded / 2 * kPanel);
  }
  for (int64_t u = 0; u < units; u += kLanes)
    for (int64_t i = 0; i < kPanel; i += kLanes)
      transpose(row + i * units + u, units, transposed + u * kPanel + i, kPanel);
}

// Returns the address of elements [d, d + kPanel) of row `row` of a matrix of units of D; d is a multiple of kPanel.
template <class Op>
inline const float* dims_at(const float* units, int64_t capacity, int64_t row, int64_t d) {
  const int64_t u = d / Op::kPair;
  return units + (u / kPanel * capacity + row) * kPanel + u % kPanel;
}

// Loads half `v` of the elements that dims_at found, as float32.
template <class Op>
inline V load_dims(const float* at, int v) {
#if defined(PACL_PAIRS)
  if (Op::kPair == 2) {
    H half;
    memcpy(&half, (const uint16_t*)at + v * kLanes, sizeof half);
    return from_bits(zero_extend(half) << 16);
  }
#endif
  return load(at + v * kLanes);
}

// Returns the index, among the images of a block with means, of the one that holds row `row`.
inline int64_t mean_of_row(const Rows& rows, int64_t row) {
  int64_t mean = 0;
  while (mean + 1 < rows.means && rows.image_begin[mean + 1] <= row) ++mean;
  return mean;
}

// Returns the row of Weights.units for mean `mean`, past those that the products' last tile overwrites.
template <class Op>
inline int64_t row_of_mean(const Rows& rows, int64_t mean) {
  return rows.count + Op::kRows + mean;
}

}  // namespace
