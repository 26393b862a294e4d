// Upsampling and arg-max of one tile: rows [y, y_last) of an image, a few vectors of columns, all classes.
//
// Each source row is resized horizontally once. Output rows between the same two source rows then take one FMA, one
// comparison and two selections per class and vector, with the best score and its label in registers.
#pragma once

#include "rows.h"

namespace {

using namespace pacl;

typedef int16_t S __attribute__((vector_size(2 * kLanes)));

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPixelRows = 8;  // output rows at a time, each with best score, label and fraction in registers
#else
constexpr int kPixelRows = 4;
#endif
constexpr int64_t kFewRows = 6;     // up to this many rows, finding candidates costs more than it saves
constexpr int64_t kSumLength = 64;  // classes of a partial sum

inline V choose(I mask, V yes, V no) { return mask ? yes : no; }
inline I choose(I mask, I yes, I no) { return mask ? yes : no; }
inline I load(const int32_t* p) {
  I i;
  memcpy(&i, p, sizeof i);
  return i;
}

inline bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(PACL_EMULATE_AMX)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__) && !defined(PACL_EMULATE_AMX)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Returns a vector whose lane i is lane index[i] of v.
inline V permute(V v, I index) {
#if defined(__AVX512F__)
  return (V)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__) && !defined(PACL_EMULATE_AMX)
  return (V)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  V out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[index[i]];
  return out;
#endif
}

// Fills the tile's columns and fractions, repeating the last one to whole vectors. Returns the first source column.
inline int64_t open_columns(const UpsampleParams& p, UpsampleTile& tile) {
  const int64_t begin = p.column[tile.first];
  for (int64_t i = 0; i < tile.vectors * kLanes; ++i) {
    const int64_t x = least(tile.first + i, p.out_width - 1);
    tile.column[i] = (int32_t)(p.column[x] - begin);
    tile.fraction[i] = p.column_fraction[x];
  }
  return begin;
}

// Resizes row `row` of all classes horizontally, from column `begin` on, a few classes at a time: their source values
// are then stored well before they are loaded again at other addresses.
inline void enlarge(const UpsampleParams& p, int64_t image, int64_t row, int64_t begin, UpsampleTile& tile, int slot) {
  const int64_t length = tile.column[tile.vectors * kLanes - 1] + 2, count = least(length, p.width - begin);
  const int64_t bytes = p.dtype == Dtype::float32 ? 4 : 2;
  I nan{};
  for (int64_t first = 0; first < p.classes; first += kSources) {
    const int64_t classes = least(kSources, p.classes - first);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at =
          image * p.strides.image + (first + c) * p.strides.class_ + row * p.strides.row + begin * p.strides.column;
      // Classes lie too far apart for the hardware prefetcher. The prefetched address need not exist.
      __builtin_prefetch((const char*)p.scores + (at + kSources * p.strides.class_) * bytes);
      float* source = tile.source + c * length;
      read_row(p.scores, at, p.strides.column, count, p.dtype, source);
      if (count < length) source[count] = source[count - 1];
    }
    for (int64_t i = 0; i < classes * length; i += kLanes) {  // elements past the last one are never used
      const V x = load(tile.source + i), low = choose(x < broadcast(-kLargestScore), broadcast(-kLargestScore), x);
      nan |= x != x;
      store(tile.source + i, choose(x > broadcast(kLargestScore), broadcast(kLargestScore), low));
    }
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const int32_t* column = tile.column + v * kLanes;
      const float* from = tile.source + column[0];
      float* to = tile.rows[slot] + (v * p.classes + first) * kLanes;
      const V fraction = load(tile.fraction + v * kLanes);
      const I exact = fraction == broadcast(0.0f);  // takes the left value alone: the right one may be NaN
      if (column[kLanes - 1] - column[0] < kLanes) {
        const I index = load(column) - column[0];
        for (int64_t c = 0; c < classes; ++c, from += length, to += kLanes) {
          const V left = permute(load(from), index), right = permute(load(from + 1), index);
          store(to, choose(exact, left, fma(fraction, right - left, left)));
        }
        continue;
      }
      for (int64_t c = 0; c < classes; ++c, to += kLanes) {
        V left, right;
        for (int i = 0; i < kLanes; ++i) {
          left[i] = tile.source[c * length + column[i]];
          right[i] = tile.source[c * length + column[i] + 1];
        }
        store(to, choose(exact, left, fma(fraction, right - left, left)));
      }
    }
  }
  tile.nan[slot] = any(nan);
}

// Returns the slot that holds row `row`. If none does, resizes the row into a slot that does not hold row `other`.
inline int hold(const UpsampleParams& p, int64_t image, int64_t row, int64_t other, int64_t begin, UpsampleTile& tile) {
  for (int slot = 0; slot < 2; ++slot)
    if (tile.held[slot] == row) return slot;
  const int slot = tile.held[0] == other ? 1 : 0;
  enlarge(p, image, row, begin, tile, slot);
  tile.held[slot] = row;
  return slot;
}

// Returns the number of classes that can win between the two source rows, and lists them in `some`. A class cannot win
// if both its ends are below both ends of another class.
inline int64_t find_candidates(const float* top, const float* bottom, int64_t classes, int32_t* some) {
  V floor = broadcast(-__builtin_inff());
  for (int64_t c = 0; c < classes; ++c) {
    const V a = load(top + c * kLanes), b = load(bottom + c * kLanes), low = choose(a < b, a, b);
    floor = choose(low > floor, low, floor);
  }
  int64_t count = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const V a = load(top + c * kLanes), b = load(bottom + c * kLanes);
    some[count] = (int32_t)c;
    count += any(~((a < floor) & (b < floor)));  // NaN compares false and stays a candidate
  }
  return count;
}

template <int kRows, bool kNan>
inline void find_best(const float* top, const float* bottom, const int32_t* classes, int64_t count,
                      const float* fraction, V* best, I* label) {
  V y[kRows], most[kRows];
  I winner[kRows];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t c = classes[i];
    const V a = load(top + c * kLanes), step = load(bottom + c * kLanes) - a;
    const I number = c - I{};
    if (i == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        y[r] = broadcast(fraction[r]);
        const V s = fma(y[r], step, a);
        most[r] = kNan ? choose(y[r] == broadcast(0.0f), a, s) : s;
        winner[r] = number;
      }
      continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V between = fma(y[r], step, a), s = kNan ? choose(y[r] == broadcast(0.0f), a, between) : between;
      // The first of equals stays. A NaN wins, and nothing replaces it.
      const I stays = kNan ? (s <= most[r]) | (most[r] != most[r]) : s <= most[r];
      most[r] = choose(stays, most[r], s);
      winner[r] = choose(stays, winner[r], number);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) best[r] = most[r], label[r] = winner[r];
}

// Computes the entropy, in nats, of the softmax of scale * score. The best score is known, so two plain sums suffice.
template <int kRows>
inline void find_entropy(const float* top, const float* bottom, int64_t classes, float scale, const float* fraction,
                         const V* best, V* entropy) {
  constexpr float kLn2 = 0.6931471805599453f;
  V total[kRows]{}, weighted[kRows]{};
  for (int64_t first = 0; first < classes; first += kSumLength) {
    V part[kRows]{}, weighted_part[kRows]{};
    for (int64_t c = first; c < least(first + kSumLength, classes); ++c) {
      const V a = load(top + c * kLanes), step = load(bottom + c * kLanes) - a;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V s = fraction[r] == 0 ? a : fma(step, fraction[r], a);
        V x = (s - best[r]) * (scale * kLog2e);
        x = choose(x < broadcast(-125.0f), broadcast(-125.0f), x);
        const V e = exp2<false>(x);
        part[r] += e;
        weighted_part[r] = fma(x, e, weighted_part[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) total[r] += part[r], weighted[r] += weighted_part[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) entropy[r] = logarithm(total[r]) - kLn2 * weighted[r] / total[r];
}

template <int kRows>
inline void finish_rows(const UpsampleParams& p, const float* top, const float* bottom, const int32_t* classes,
                        int64_t count, bool nan, int64_t y, int64_t at, int64_t columns) {
  V best[kRows];
  I label[kRows];
  if (nan)
    find_best<kRows, true>(top, bottom, classes, count, p.row_fraction + y, best, label);
  else
    find_best<kRows, false>(top, bottom, classes, count, p.row_fraction + y, best, label);
  for (int r = 0; r < kRows; ++r) {
    const S narrow = __builtin_convertvector(label[r], S);
    memcpy(p.labels + at + r * p.out_width, &narrow, sizeof(int16_t) * columns);
    if (p.best) memcpy(p.best + at + r * p.out_width, &best[r], sizeof(float) * columns);
  }
  if (!p.entropy) return;
  constexpr int kPart = kRows < 4 ? kRows : kPixelRows / 2;  // more sums do not fit in the registers
  for (int r = 0; r < kRows; r += kPart) {
    V entropy[kPart];
    find_entropy<kPart>(top, bottom, p.classes, p.scale, p.row_fraction + y + r, best + r, entropy);
    for (int i = 0; i < kPart; ++i)
      memcpy(p.entropy + at + (r + i) * p.out_width, &entropy[i], sizeof(float) * columns);
  }
}

template <int kRows>
inline void finish_run(const UpsampleParams& p, const float* top, const float* bottom, const int32_t* classes,
                       int64_t count, bool nan, int64_t& y, int64_t last, int64_t image, int64_t x, int64_t columns) {
  for (; y + kRows <= last; y += kRows)
    finish_rows<kRows>(p, top, bottom, classes, count, nan, y, (image * p.out_height + y) * p.out_width + x, columns);
}

void upsample_argmax(const UpsampleParams& p, int64_t image, int64_t y, int64_t y_last, UpsampleTile& tile) {
  const int64_t begin = open_columns(p, tile);
  tile.held[0] = tile.held[1] = -1;
  while (y < y_last) {
    const int64_t row = p.row[y], next = least(row + 1, p.height - 1);
    int64_t end = y + 1;
    while (end < y_last && p.row[end] == row) ++end;
    const int slot = hold(p, image, row, next, begin, tile), next_slot = hold(p, image, next, row, begin, tile);
    const bool nan = tile.nan[slot] || tile.nan[next_slot];
    for (int64_t v = 0; v < tile.vectors; ++v) {
      const float *top = tile.rows[slot] + v * p.classes * kLanes,
                  *bottom = tile.rows[next_slot] + v * p.classes * kLanes;
      const int64_t x = tile.first + v * kLanes, columns = least(kLanes, p.out_width - x);
      const int32_t* classes = tile.all;
      int64_t count = p.classes, at = y;
      if (end - y > kFewRows) {
        count = find_candidates(top, bottom, p.classes, tile.some);
        classes = tile.some;
      }
      if (kPixelRows == 8) finish_run<8>(p, top, bottom, classes, count, nan, at, end, image, x, columns);
      finish_run<4>(p, top, bottom, classes, count, nan, at, end, image, x, columns);
      finish_run<2>(p, top, bottom, classes, count, nan, at, end, image, x, columns);
      finish_run<1>(p, top, bottom, classes, count, nan, at, end, image, x, columns);
    }
    y = end;
  }
}

}  // namespace
