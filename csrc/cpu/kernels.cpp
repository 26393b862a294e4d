// The two fused functions, written once on the vectors of simd.h and compiled once per instruction set.
// No std:: templates and no shared inline functions: the linker could keep an AVX-512 copy of them for everyone.

#include "score.h"
#include "simd.h"

namespace {

using namespace pacl;

constexpr float kMinNormSquared = 1e-24f;  // a shorter patch or text has no direction: similarity 0, gradient 0
constexpr float kMinPooledNorm = 1e-6f;

// ---- products -------------------------------------------------------------------------------------------------------

// One tile of kRows x kPanel sums in registers: c (+)= left right over `inner` units (a multiple of 4).
// Left element (i, j) is left[i * kI + j * kJ] within a block of kPanel units, blocks are left_block apart.
template <class Op, int kRows, int kI, int kJ>
__attribute__((noinline)) void tile(const float* left, int64_t left_block, const float* right, float* c, int64_t inner,
                                    bool add) {
  V sum[kRows][2];
  if (add) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sum[i][0] = load(c + i * kPanel);
      sum[i][1] = load(c + i * kPanel + kLanes);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = V{};
  }
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
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(c + i * kPanel, sum[i][0]);
    store(c + i * kPanel + kLanes, sum[i][1]);
  }
}

// One panel of the product: c [rows, panel] (+)= left [rows, inner] right [inner, panel], in whole tiles of rows.
template <class Op>
void product(const float* left, int64_t capacity, int64_t rows, const float* right, int64_t inner, float* c, bool add) {
  const int64_t block = capacity * kPanel;
  for (int64_t at = 0; at < inner; at += kInnerBlock)
    for (int64_t row = 0; row < rows; row += kTileRows)
      tile<Op, kTileRows, kPanel, 1>(left + at / kPanel * block + row * kPanel, block, right + at * kPanel,
                                     c + row * kPanel, least(kInnerBlock, inner - at), add || at > 0);
}

// ---- elements of the caller's tensors -------------------------------------------------------------------------------

inline float float_from_bits(uint32_t i) {
  float f;
  memcpy(&f, &i, sizeof f);
  return f;
}
inline uint32_t float_bits(float f) {
  uint32_t i;
  memcpy(&i, &f, sizeof i);
  return i;
}
inline float from_bfloat16(uint16_t x) { return float_from_bits((uint32_t)x << 16); }
inline uint16_t to_bfloat16(float f) {
  uint32_t i = float_bits(f);
  if (f != f) return (uint16_t)((i >> 16) | 64);
  return (uint16_t)((i + 0x7FFF + ((i >> 16) & 1)) >> 16);
}
inline float from_float16(uint16_t x) {
  uint32_t magnitude = (uint32_t)(x & 0x7FFF) << 13, sign = (uint32_t)(x & 0x8000) << 16;
  float f = float_from_bits(magnitude) * float_from_bits(239u << 23);  // 2^112 moves the exponent, denormals too
  uint32_t special = (x & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;         // infinity and NaN
  return float_from_bits(float_bits(f) | special | sign);
}
inline uint16_t to_float16(float f) {
  uint32_t i = float_bits(f), sign = (i >> 16) & 0x8000;
  i &= 0x7FFFFFFF;
  if (i > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (i >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // rounds to 65536 or more
  if (i < 0x38800000) {                                    // denormal: let an addition round
    float g = float_from_bits(i) + 0.5f;
    return (uint16_t)(sign | (float_bits(g) - 0x3F000000));
  }
  return (uint16_t)(sign | ((i - 0x38000000 + 0xFFF + ((i >> 13) & 1)) >> 13));
}

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

void write_row(void* base, int64_t offset, int64_t dim, Dtype dtype, const float* in) {
  uint16_t* half = (uint16_t*)base + offset;
  if (dtype == Dtype::float32)
    memcpy((float*)base + offset, in, sizeof(float) * dim);
  else if (dtype == Dtype::bfloat16)
    for (int64_t d = 0; d < dim; ++d) half[d] = to_bfloat16(in[d]);
  else
    for (int64_t d = 0; d < dim; ++d) half[d] = to_float16(in[d]);
}

inline int64_t padded_dim(int64_t dim) { return round_up(dim, kPanel); }

// One row as units, zero up to `padded` units. For bfloat16 units they are the caller's own bits.
template <class Op>
void read_units(const void* base, int64_t offset, int64_t stride, int64_t dim, Dtype dtype, float* out, int64_t padded) {
  if (Op::kPair == 1) {
    read_row(base, offset, stride, dim, dtype, out);
  } else {
    const uint16_t* in = (const uint16_t*)base + offset;
    uint16_t* to = (uint16_t*)out;
    if (stride == 1)
      memcpy(to, in, sizeof(uint16_t) * dim);
    else
      for (int64_t d = 0; d < dim; ++d) to[d] = in[d * stride];
  }
  memset((char*)out + dim * 4 / Op::kPair, 0, padded * 4 - dim * 4 / Op::kPair);
}

template <class Op>
float inverse_norm(const float* units, int64_t padded) {
  V even{}, odd{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    V x = load(units + i);
    if (Op::kPair == 1) {
      even += x * x;
    } else {
      V low = from_bits(bits(x) << 16), high = from_bits(bits(x) & (int32_t)0xFFFF0000);
      even += low * low;
      odd += high * high;
    }
  }
  float squared = sum(even + odd);
  return squared < kMinNormSquared ? 0.0f : 1.0f / __builtin_sqrtf(squared);
}

// Units of D, padded to whole panels.
template <class Op>
inline int64_t dim_units(const ScoreParams& p) {
  return round_up(ceil_div(p.dim, Op::kPair), kPanel);
}

// Inner length of a product over D: units that hold something, in fours.
template <class Op>
inline int64_t dim_inner(const ScoreParams& p) {
  return round_up(ceil_div(p.dim, Op::kPair), 4);
}

// Two rows of bfloat16 as one row of units (first row in the low halves), over panels `panels_apart` floats apart.
inline void interleave(const float* even_units, const float* odd_units, int64_t dim, float* out, int64_t panels_apart) {
  const uint16_t *even = (const uint16_t*)even_units, *odd = (const uint16_t*)odd_units;
  for (int64_t d = 0; d < dim; d += kPanel, out += panels_apart)
    for (int i = 0; i < kPanel; ++i) {
      uint32_t unit = (uint32_t)even[d + i] | (uint32_t)odd[d + i] << 16;
      memcpy(out + i, &unit, sizeof unit);
    }
}

template <class Op>
void pack_rows(const ScoreParams& p, const int64_t* row_start, int64_t first, int64_t last, Rows& to, int64_t at,
               float* row) {
  const int64_t units = dim_units<Op>(p), dims = padded_dim(p.dim), row_floats = most(units, dims);
  int64_t image = 0;
  for (int64_t high = p.images; high - image > 1;) {  // the image that holds row `first`
    const int64_t middle = (image + high) / 2;
    (row_start[middle] <= first ? image : high) = middle;
  }
  int64_t n = -1, place = row_start[image] - 1;  // the last patch looked at, and its row
  for (int64_t r = first; r < last; ++r, ++at) {
    while (image < p.images && r >= row_start[image + 1]) {
      ++image;
      n = -1;
      place = image < p.images ? row_start[image] - 1 : 0;
    }
    if (image < p.images) {
      const uint8_t* mask = p.mask ? p.mask + image * p.mask_stride_image : nullptr;
      while (place < r && n < p.patches_per_image) {
        ++n;
        if (n < p.patches_per_image && (!mask || mask[n * p.mask_stride_row])) ++place;
      }
    }
    const bool padding = image >= p.images || n >= p.patches_per_image;
    float* buffer = row + (Op::kPair == 2 && (at & 1) ? row_floats : 0);
    if (padding)
      memset(buffer, 0, sizeof(float) * row_floats);
    else
      read_units<Op>(p.patches, image * p.patch_stride_image + n * p.patch_stride_row, p.patch_stride_dim, p.dim,
                     p.dtype, buffer, row_floats);
    to.image[at] = padding ? -1 : (int32_t)image;
    to.index[at] = padding ? -1 : (int32_t)n;
    to.inv_norm[at] = padding ? 0.0f : inverse_norm<Op>(buffer, units);
    for (int64_t u = 0; u < units; u += kPanel)
      memcpy(to.units + (u / kPanel * to.capacity + at) * kPanel, buffer + u, sizeof(float) * kPanel);
    if (Op::kPair == 2 && to.row_units && (at & 1))
      interleave(row, row + row_floats, dims, to.row_units + at / 2 * kPanel, to.capacity / 2 * kPanel);
  }
}

template <class Op>
void pack_texts(const ScoreParams& p, Texts& to, int64_t panel, float* row) {
  const int64_t units = dim_units<Op>(p), dims = padded_dim(p.dim), row_floats = most(units, dims);
  float* transposed = to.transposed + panel * units * kPanel;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t k = panel * kPanel + i;
    float* buffer = row + i * row_floats;
    if (k < to.count)
      read_units<Op>(p.texts, (to.first + k) * p.text_stride_row, p.text_stride_dim, p.dim, p.dtype, buffer, row_floats);
    else
      memset(buffer, 0, sizeof(float) * row_floats);
    to.inv_norm[k] = inverse_norm<Op>(buffer, units);
    if (!to.row_units) continue;
    if (Op::kPair == 1)
      for (int64_t d = 0; d < dims; d += kPanel)
        memcpy(to.row_units + (d / kPanel * to.padded + k) * kPanel, buffer + d, sizeof(float) * kPanel);
    else if (i & 1)
      interleave(buffer - row_floats, buffer, dims, to.row_units + k / 2 * kPanel, to.padded / 2 * kPanel);
  }
  for (int64_t u = 0; u < units; u += kLanes)
    for (int64_t i = 0; i < kPanel; i += kLanes)
      transpose(row + i * row_floats + u, row_floats, transposed + u * kPanel + i, kPanel);
}

// ---- softmax over patches -------------------------------------------------------------------------------------------

// [K] values of one image for one panel of texts, 0 past the last text.
struct Lane {
  V half[2];
  Lane(const float* values, int64_t available) {
    float buffer[kPanel] = {};
    memcpy(buffer, values, sizeof(float) * least(available, kPanel));
    half[0] = load(buffer);
    half[1] = load(buffer + kLanes);
  }
  Lane() : half{V{}, V{}} {}
};

void store_lanes(float* to, const V half[2], int64_t available) {
  float buffer[kPanel];
  store(buffer, half[0]);
  store(buffer + kLanes, half[1]);
  memcpy(to, buffer, sizeof(float) * least(available, kPanel));
}

// The rows of one image in [row, last): where they end.
inline int64_t segment_end(const Rows& rows, int64_t row, int64_t last) {
  const int32_t image = rows.image[row];
  while (row < last && rows.image[row] == image) ++row;
  return row;
}

// G = p p' / (|p| |p'|) of rows [first, first + count), as panels [count, count] of `capacity` rows, 0 past the last one.
template <class Op>
void gram(const ScoreParams& p, const Rows& rows, int64_t first, int64_t count, float* transposed, float* g,
          int64_t capacity) {
  const int64_t units = dim_units<Op>(p);
  for (int64_t column = 0; column < count; column += kPanel) {
    const int64_t live = least(kPanel, count - column);
    for (int64_t u = 0; u < units; u += kLanes) {
      const float* block = rows.units + (u / kPanel * rows.capacity + first + column) * kPanel + u % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes) transpose(block + i * kPanel, kPanel, transposed + u * kPanel + i, kPanel);
    }
    // Symmetric: rows above this panel's own are the transposes of blocks that earlier panels hold.
    const int64_t top = column / kTileRows * kTileRows;
    float* panel = g + column / kPanel * capacity * kPanel;
    product<Op>(rows.units + (first + top) * kPanel, rows.capacity, count - top, transposed, dim_inner<Op>(p),
                panel + top * kPanel, false);
    float column_norm[kPanel] = {};
    memcpy(column_norm, rows.inv_norm + first + column, sizeof(float) * live);
    I keep[2];
    for (int i = 0; i < kPanel; ++i) keep[i / kLanes][i % kLanes] = i < live ? -1 : 0;
    for (int64_t row = column; row < count; ++row)
      for (int v = 0; v < 2; ++v) {
        float* at = panel + row * kPanel + v * kLanes;
        V value = load(at) * (load(column_norm + v * kLanes) * rows.inv_norm[first + row]);
        store(at, select(keep[v], value, V{}));
      }
    for (int64_t row = 0; row < column; row += kLanes) {
      const float* mirror = g + row / kPanel * capacity * kPanel + column * kPanel + row % kPanel;
      for (int64_t i = 0; i < kPanel; i += kLanes) transpose(mirror + i * kPanel, kPanel, panel + row * kPanel + i, kPanel);
    }
  }
}

// G times a panel over `count` rows, whose rows up to the next multiple of 4 are set to 0.
void gram_product(const float* g, int64_t capacity, int64_t count, float* panel, float* out) {
  const int64_t inner = round_up(count, 4);
  memset(panel + count * kPanel, 0, sizeof(float) * (inner - count) * kPanel);
  product<Float32>(g, capacity, count, panel, inner, out, false);
}

// sqrt(max(r², 0)), NaN kept.
inline V pooled_norms(V squared) {
  for (int i = 0; i < kLanes; ++i) squared[i] = __builtin_sqrtf(squared[i] < 0 ? 0.0f : squared[i]);
  return squared;
}

struct Softmax {  // running statistics of one image and one panel of texts
  V largest[2], sum[2], weighted[2];
};

// Adds rows [row, last) of one image; leaves s in scores and, if attention is given, e^((s - largest) / τ) there.
inline void accumulate(Softmax& running, const Rows& rows, int64_t row, int64_t last, const float* text_norm,
                       float inv_temperature, float* scores, float* attention) {
  for (int v = 0; v < 2; ++v) {
    const V norm = load(text_norm + v * kLanes);
    V largest = running.largest[v];
    for (int64_t r = row; r < last; ++r) {
      float* at = scores + r * kPanel + v * kLanes;
      const V s = load(at) * (norm * rows.inv_norm[r]);
      store(at, s);
      largest = maximum(s, largest);
    }
    const V shrink = exponential((running.largest[v] - largest) * inv_temperature);
    V total = running.sum[v] * shrink, weighted = running.weighted[v] * shrink;
    for (int64_t r = row; r < last; ++r) {
      const V s = load(scores + r * kPanel + v * kLanes);
      const V e = exponential((s - largest) * inv_temperature);
      if (attention) store(attention + r * kPanel + v * kLanes, e);
      total += e;
      weighted += s * e;
    }
    running.largest[v] = largest;
    running.sum[v] = total;
    running.weighted[v] = weighted;
  }
}

template <class Op>
void forward(const ScoreParams& p, const int64_t* row_start, int64_t first, int64_t last, const Texts& texts,
             int64_t panel_first, int64_t panel_last, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p), columns = (panel_last - panel_first) * kPanel;
  const float inv_temperature = 1.0f / p.temperature;
  Rows& rows = scratch.rows;
  for (int64_t i = 0; i < (last - first) * columns; ++i) {
    scratch.largest[i] = -2.0f;  // below every cosine, and finite
    scratch.sum[i] = scratch.weighted[i] = 0.0f;
  }
  for (int64_t row = row_start[first]; row < row_start[last]; row += rows.capacity) {
    const int64_t count = least(rows.capacity, row_start[last] - row);
    pack_rows<Op>(p, row_start, row, row + count, rows, 0, scratch.row);
    if (p.form == Form::cosine) gram<Op>(p, rows, 0, count, scratch.transposed, scratch.gram, rows.capacity);
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      product<Op>(rows.units, rows.capacity, count, texts.transposed + panel * units * kPanel, dim_inner<Op>(p),
                  scratch.scores, false);
      for (int64_t begin = 0, end; begin < count; begin = end) {
        end = segment_end(rows, begin, count);
        if (rows.image[begin] < 0) continue;
        const int64_t at = (rows.image[begin] - first) * columns + (panel - panel_first) * kPanel;
        Softmax running;
        for (int v = 0; v < 2; ++v) {
          running.largest[v] = load(scratch.largest + at + v * kLanes);
          running.sum[v] = load(scratch.sum + at + v * kLanes);
          running.weighted[v] = load(scratch.weighted + at + v * kLanes);
        }
        const bool cosine = p.form == Form::cosine;
        accumulate(running, rows, begin, end, texts.inv_norm + panel * kPanel, inv_temperature, scratch.scores,
                   cosine ? scratch.attention : nullptr);
        if (cosine) {
          gram_product(scratch.gram, rows.capacity, end, scratch.attention, scratch.pooled);
          for (int v = 0; v < 2; ++v) {
            V squared{};
            for (int64_t r = 0; r < end; ++r)
              squared += load(scratch.attention + r * kPanel + v * kLanes) * load(scratch.pooled + r * kPanel + v * kLanes);
            // φ = u / max(r, floor); neither is divided by l yet, the division by l at the end is undone here.
            const V floor = kMinPooledNorm * running.sum[v], norm = maximum(pooled_norms(squared), floor);
            running.weighted[v] = running.weighted[v] / norm * running.sum[v];
          }
        }
        for (int v = 0; v < 2; ++v) {
          store(scratch.largest + at + v * kLanes, running.largest[v]);
          store(scratch.sum + at + v * kLanes, running.sum[v]);
          store(scratch.weighted + at + v * kLanes, running.weighted[v]);
        }
      }
    }
  }
  for (int64_t image = first; image < last; ++image)
    for (int64_t panel = panel_first; panel < panel_last; ++panel) {
      const int64_t at = (image - first) * columns + (panel - panel_first) * kPanel, k = panel * kPanel;
      V phi[2], lse[2];
      for (int v = 0; v < 2; ++v) {
        const V total = load(scratch.sum + at + v * kLanes);
        const I empty = total == V{};  // no valid patch
        phi[v] = select(empty, V{}, load(scratch.weighted + at + v * kLanes) / total);
        lse[v] = select(empty, V{}, load(scratch.largest + at + v * kLanes) * inv_temperature + logarithm(total));
      }
      store_lanes(p.phi + image * p.texts_count + texts.first + k, phi, texts.count - k);
      store_lanes(p.lse + image * p.texts_count + texts.first + k, lse, texts.count - k);
    }
}

// ---- weights of the backward ----------------------------------------------------------------------------------------

// A panel of weights [first, last) in float32, into the units of the two products.
template <class Op>
void store_weights(const float* panel_weights, const Rows& rows, int64_t first, int64_t last, int64_t panel, Weights& to) {
#if defined(__AVX512BF16__)
  if (Op::kPair == 2) {
    for (int64_t r = first; r < last; r += 2) {
      H rounded[2][2];
      for (int odd = 0; odd < 2; ++odd) {
        float* units = to.units + (panel / 2 * rows.capacity + r + odd) * kPanel + panel % 2 * kLanes;
        for (int v = 0; v < 2; ++v) {
          rounded[odd][v] = round_to_bfloat16(load(panel_weights + (r + odd - first) * kPanel + v * kLanes));
          memcpy(units + v * kLanes / 2, &rounded[odd][v], sizeof(H));
        }
      }
      for (int v = 0; v < 2; ++v) {
        I low = __builtin_convertvector(rounded[0][v], I), high = __builtin_convertvector(rounded[1][v], I);
        store(to.row_units + (panel * (rows.capacity / 2) + r / 2) * kPanel + v * kLanes, from_bits(low | high << 16));
      }
    }
    return;
  }
#endif
  memcpy(to.units + (panel * rows.capacity + first) * kPanel, panel_weights, sizeof(float) * (last - first) * kPanel);
}

template <class Op>
double weights_dot(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                   int64_t panel_first, int64_t panel_last, Weights& to, Scratch& scratch) {
  const int64_t units = dim_units<Op>(p);
  const float inv_temperature = 1.0f / p.temperature;
  double total = 0;
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const int64_t k = panel * kPanel, live = texts.count - k;
    product<Op>(rows.units + first * kPanel, rows.capacity, last - first, texts.transposed + panel * units * kPanel,
                dim_inner<Op>(p), scratch.scores, false);
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = segment_end(rows, begin, last);
      float* scores = scratch.scores + (begin - first) * kPanel;
      if (rows.image[begin] < 0) {
        memset(scores, 0, sizeof(float) * (end - begin) * kPanel);
        continue;
      }
      const int64_t at = rows.image[begin] * p.texts_count + texts.first + k;
      const Lane phi(p.phi + at, live), lse(p.lse + at, live), g(p.grad_phi + at, live);
      for (int v = 0; v < 2; ++v) {
        const V norm = load(texts.inv_norm + k + v * kLanes);
        // dS = e (alpha + beta s), with e = exp(s / τ - lse)
        const V beta = g.half[v] * inv_temperature, alpha = g.half[v] - beta * phi.half[v];
        V along{};
        for (int64_t r = begin; r < end; ++r) {
          float* to_row = scores + (r - begin) * kPanel + v * kLanes;
          const V scale = norm * rows.inv_norm[r], s = load(to_row) * scale;
          const V ds = exponential(s * inv_temperature - lse.half[v]) * (alpha + beta * s);
          along += ds * s;
          store(to_row, ds * scale);
        }
        total += sum(along);
      }
    }
    store_weights<Op>(scratch.scores, rows, first, last, panel, to);
  }
  return total;
}

#include "cosine.inc"

template <class Op>
double weights(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
               int64_t panel_first, int64_t panel_last, Weights& to, float* patches_sum, bool add, Scratch& scratch) {
  if (p.form == Form::dot) return weights_dot<Op>(p, rows, first, last, texts, panel_first, panel_last, to, scratch);
  return weights_cosine<Op>(p, rows, first, last, texts, panel_first, panel_last, to, patches_sum, add, scratch);
}

// ---- gradients ------------------------------------------------------------------------------------------------------

template <class Op>
void patches_product(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const Texts& texts,
                     const Weights& w, float* patches_sum, bool add) {
  const int64_t inner = texts.padded / Op::kPair, block = rows.capacity * kPanel;
  for (int64_t at = 0; at < inner; at += kInnerBlock)
    for (int64_t panel = 0; panel < padded_dim(p.dim) / kPanel; ++panel)
      product<Op>(w.units + at / kPanel * block + first * kPanel, rows.capacity, last - first,
                  texts.row_units + (panel * inner + at) * kPanel, least(kInnerBlock, inner - at),
                  patches_sum + panel * block + first * kPanel, add || at > 0);
}

template <class Op>
void texts_product(const ScoreParams& p, const Rows& rows, const Texts& texts, const Weights& w, int64_t first,
                   int64_t last, int64_t panel_first, int64_t panel_last) {
  const int64_t inner = rows.count / Op::kPair, panel_floats = rows.capacity / Op::kPair * kPanel;
  const int64_t sum_floats = round_up(p.texts_count, kPanel) * kPanel;
  for (int64_t at = 0; at < inner; at += kInnerBlock)
    for (int64_t panel = panel_first; panel < panel_last; ++panel)
      for (int64_t k = first * kTileColumns; k < last * kTileColumns; k += kTileColumns)
        tile<Op, kTileColumns, 1, kPanel>(w.row_units + k / kPanel * panel_floats + at * kPanel + k % kPanel,
                                          kPanel * kPanel, rows.row_units + panel * panel_floats + at * kPanel,
                                          p.texts_sum + panel * sum_floats + (texts.first + k) * kPanel,
                                          least(kInnerBlock, inner - at), true);
}

// ∂L/∂x = sum - (sum · x) x / |x|²: what points along x does not change its direction.
void finish_row(const float* sums, int64_t panel_floats, const void* x, int64_t x_offset, int64_t x_stride,
                float inv_norm, void* out, int64_t out_offset, const ScoreParams& p, float* row) {
  const int64_t dims = padded_dim(p.dim);
  float* result = row + dims;
  read_row(x, x_offset, x_stride, p.dim, p.dtype, row);
  memset(row + p.dim, 0, sizeof(float) * (dims - p.dim));
  V dot{};
  for (int64_t d = 0; d < dims; d += kLanes) dot += load(row + d) * load(sums + d / kPanel * panel_floats + d % kPanel);
  const float along = sum(dot) * inv_norm * inv_norm;
  for (int64_t d = 0; d < dims; d += kLanes)
    store(result + d, load(sums + d / kPanel * panel_floats + d % kPanel) - load(row + d) * along);
  write_row(out, out_offset, p.dim, p.dtype, result);
}

void finish_patches(const ScoreParams& p, const Rows& rows, int64_t first, int64_t last, const float* patches_sum,
                    float* row) {
  for (int64_t r = first; r < last; ++r) {
    const int64_t image = rows.image[r], n = rows.index[r];
    if (image >= 0)
      finish_row(patches_sum + r * kPanel, rows.capacity * kPanel, p.patches,
                 image * p.patch_stride_image + n * p.patch_stride_row, p.patch_stride_dim, rows.inv_norm[r],
                 p.grad_patches, (image * p.patches_per_image + n) * p.dim, p, row);
  }
}

void finish_texts(const ScoreParams& p, int64_t first, int64_t last, float* row) {
  const int64_t dims = padded_dim(p.dim), panel_floats = round_up(p.texts_count, kPanel) * kPanel;
  for (int64_t k = first; k < last; ++k) {
    read_row(p.texts, k * p.text_stride_row, p.text_stride_dim, p.dim, p.dtype, row);
    memset(row + p.dim, 0, sizeof(float) * (dims - p.dim));
    finish_row(p.texts_sum + k * kPanel, panel_floats, p.texts, k * p.text_stride_row, p.text_stride_dim,
               inverse_norm<Float32>(row, dims), p.grad_texts, k * p.dim, p, row);
  }
}

template <class Op>
double multiply_adds(int64_t repeats) {
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

#define PACL_STRING_(x) #x
#define PACL_STRING(x) PACL_STRING_(x)

template <class Op>
constexpr Kernels table() {
  return {PACL_STRING(PACL_ISA), kLanes, kPanel, kTileRows, kTileColumns, Op::kPair,
          pack_rows<Op>, pack_texts<Op>, forward<Op>, weights<Op>, patches_product<Op>, texts_product<Op>,
          finish_patches, finish_texts, multiply_adds<Op>};
}

}  // namespace

namespace pacl {
namespace PACL_ISA {
extern const Kernels kernels, pair_kernels;
#if defined(__AVX512BF16__)
const Kernels pair_kernels = table<BFloat16>();
#else
const Kernels kernels = table<Float32>();
#endif
}  // namespace PACL_ISA
}  // namespace pacl
