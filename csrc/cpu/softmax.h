// The softmax over patches of a panel of scores.
#pragma once

#include "rows.h"

namespace {

using namespace pacl;

// Values of one image for one panel of texts; 0 past the last text.
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

// Returns the end of the rows in [row, last) of the same image as `row`.
inline int64_t segment_end(const Rows& rows, int64_t row, int64_t last) {
  const int32_t image = rows.image[row];
  while (row < last && rows.image[row] == image) ++row;
  return row;
}

constexpr float kLn2 = 0.693147181f;

inline bool omits_running_max(const CompatibilityParams& p) { return p.temperature >= kRunningMaxBelow && !p.raw; }

// Rows of a partial sum. Long sums add partial sums, so that their rounding error does not grow with N.
constexpr int64_t kSumRows = 32;

// Running statistics of one image and one panel of texts. Without a running maximum, z = s log2(e) / τ and e = 2^z;
// `largest` is unused. With it, e = exp((s - largest) / τ): the division by τ then enlarges only the rounding error of
// small differences.
struct Softmax {
  V largest[2], sum[2], weighted[2];  // sum = Σ e, weighted = Σ e z, or with a running maximum Σ e (s - largest)
};

constexpr float kBelowEveryScore = -1e30f;  // initial value of `largest`

// Computes φ and the state of the dot form from complete statistics; both are 0 for an image without a valid patch.
inline void dot_from_softmax(const CompatibilityParams& p, const Softmax& sums, V phi[2], V state[2]) {
  for (int v = 0; v < 2; ++v) {
    const I empty = sums.sum[v] == V{};
    const V mean = sums.weighted[v] / sums.sum[v];
    phi[v] = omits_running_max(p) ? mean * (kLn2 * p.temperature) : sums.largest[v] + mean;
    state[v] = logarithm(sums.sum[v]);
    if (!omits_running_max(p)) state[v] += (sums.largest[v] - phi[v]) / p.temperature;
    phi[v] = select(empty, V{}, phi[v]);
    state[v] = select(empty, V{}, state[v]);
  }
}

// Adds the scores (raw products) of rows [row, last), all of one image. Stores e in `attention` unless that is null.
template <bool kRunningMax>
inline void accumulate(Softmax& running, const Rows& rows, int64_t row, int64_t last, const float* text_norm,
                       float temperature, float* scores, float* attention) {
  const float scale = kLog2e / temperature;
  for (int v = 0; v < 2; ++v) {
    const V norm = kRunningMax ? load(text_norm + v * kLanes) : load(text_norm + v * kLanes) * scale;
    V largest = running.largest[v], total = running.sum[v], weighted = running.weighted[v];
    if (kRunningMax) {
      for (int64_t r = row; r < last; ++r)
        largest = maximum(load(scores + r * kPanel + v * kLanes) * (norm * rows.inv_norm[r]), largest);
      const V moved = running.largest[v] - largest, shrink = exp2<true>(moved, scale);
      weighted = fma(moved, total, weighted) * shrink;
      total *= shrink;
    }
    for (int64_t begin = row; begin < last; begin += kSumRows) {
      V part{}, part_weighted{};
      for (int64_t r = begin; r < least(begin + kSumRows, last); ++r) {
        const V s = load(scores + r * kPanel + v * kLanes) * (norm * rows.inv_norm[r]);
        const V z = kRunningMax ? s - largest : s;
        const V e = kRunningMax ? exp2<true>(z, scale) : exp2<false>(z);
        if (attention) store(attention + r * kPanel + v * kLanes, e);
        part += e;
        part_weighted = fma(z, e, part_weighted);
      }
      total += part;
      weighted += part_weighted;
    }
    running.largest[v] = largest;
    running.sum[v] = total;
    running.weighted[v] = weighted;
  }
}

}  // namespace
