// The losses over logits [B, B] and their gradients, for a block of rows at a time. Image i belongs to text i.
#pragma once

#include "sigmoid.h"

namespace {

using namespace pacl;

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kPartColumns = 512;  // columns of a partial sum in float32; longer sums add these in float64

// Returns e^x for x up to 88; NaN stays NaN, and x below -87 gives exactly 0.
inline V exponential(V x) {
  const V low = broadcast(-87.0f);
  const I small = x < low;
  return select(small, V{}, exp2<false>(select(small, low, x), kLog2e));
}

inline V load_live(const float* from, int64_t live, float rest) {
  if (live >= kLanes) return load(from);
  V v = broadcast(rest);
  memcpy(&v, from, sizeof(float) * live);
  return v;
}
inline void store_live(float* to, V v, int64_t live) { memcpy(to, &v, sizeof(float) * least(live, kLanes)); }

// φ and logits of a row in the columns from `column` on. Past the last column φ is 0 and the logit is -inf, or for the
// sigmoid loss so small that both loss and gradient are 0.
struct Logits {
  V phi, z;
  Logits(const LossParams& p, int64_t row, int64_t column) {
    const int64_t live = p.size - column;
    phi = load_live(p.phi + row * p.size + column, live, 0.0f);
    z = phi * p.scale + p.bias;  // not an FMA: the pair's logit, which is subtracted, must be rounded like the others
    if (live < kLanes) z = load_live((const float*)&z, live, p.sigmoid ? -0x1p127f : -kInfinity);
  }
};

// Returns a mask of the lane that holds the pair of row `row`.
inline I own_lane(int64_t row, int64_t column) { return lane_numbers() == (int32_t)(row - column); }

// The sigmoid loss log(1 + e^z) and its derivative of z, the logit, or minus the logit of a pair.
struct Softplus {
  V loss, derivative;
  explicit Softplus(V z) {
    const V e = exponential(-maximum(z, -z)), inverse = 1.0f / (e + 1.0f);
    loss = log_one_plus(e) + maximum(z, V{});
    derivative = select(z >= V{}, inverse, e * inverse);
  }
};

// Writes the rows' statistics, and for each column largest and Σ exp(z - largest) over these rows to `columns`,
// [2, columns_padded].
void infonce_rows(const LossParams& p, int64_t first, int64_t last, float* columns, int64_t columns_padded) {
  const int64_t size = p.size;
  float *column_largest = columns, *column_total = columns + columns_padded;
  float *row_largest = p.statistics, *row_inverse = p.statistics + size;
  for (int64_t c = 0; c < size; c += kLanes) {
    store(column_largest + c, broadcast(-kInfinity));
    store(column_total + c, V{});
  }
  for (int64_t row = first; row < last; ++row) {
    V largest = broadcast(-kInfinity);
    for (int64_t c = 0; c < size; c += kLanes) {
      const V z = Logits(p, row, c).z;
      largest = maximum(z, largest);
      store(column_largest + c, maximum(z, load(column_largest + c)));
    }
    float most = largest[0];
    for (int i = 1; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    row_largest[row] = most == -kInfinity ? 0.0f : most;
  }
  for (int64_t c = 0; c < size; c += kLanes) {
    const V largest = load(column_largest + c);
    store(column_largest + c, select(largest == broadcast(-kInfinity), V{}, largest));
  }
  for (int64_t row = first; row < last; ++row) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += kPartColumns) {
      V part{};
      for (int64_t c = begin; c < least(begin + kPartColumns, size); c += kLanes) {
        const V z = Logits(p, row, c).z;
        part += exponential(z - row_largest[row]);
        store(column_total + c, load(column_total + c) + exponential(z - load(column_largest + c)));
      }
      total += sum(part);
    }
    row_inverse[row] = (float)(1 / total);
  }
}

// Returns B times the sigmoid loss of the rows.
double sigmoid_rows(const LossParams& p, int64_t first, int64_t last) {
  double total = 0;
  for (int64_t row = first; row < last; ++row)
    for (int64_t begin = 0; begin < p.size; begin += kPartColumns) {
      V part{};
      for (int64_t c = begin; c < least(begin + kPartColumns, p.size); c += kLanes) {
        const V z = Logits(p, row, c).z;
        part += Softplus(select(own_lane(row, c), -z, z)).loss;
      }
      total += sum(part);
    }
  return total;
}

double loss_rows(const LossParams& p, int64_t first, int64_t last, float* columns, int64_t columns_padded) {
  if (p.sigmoid) return sigmoid_rows(p, first, last);
  infonce_rows(p, first, last, columns, columns_padded);
  return 0;
}

void loss_columns(const LossParams& p, int64_t first, int64_t last, const float* columns, int64_t columns_padded,
                  int64_t blocks) {
  for (int64_t c = first; c < last; c += kLanes) {
    V largest = broadcast(-kInfinity), total{};
    for (int pass = 0; pass < 2; ++pass) {
      const V shift = select(largest == broadcast(-kInfinity), V{}, largest);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* part = columns + block * 2 * columns_padded + c;
        const V of_block = load(part + columns_padded);
        const V largest_of_block = select(of_block == V{}, broadcast(-kInfinity), load(part));
        if (pass == 0)
          largest = maximum(largest_of_block, largest);
        else
          total += of_block * exponential(largest_of_block - shift);
      }
      if (pass == 1) store_live(p.statistics + 2 * p.size + c, shift, p.size - c);
    }
    store_live(p.statistics + 3 * p.size + c, 1.0f / total, p.size - c);
  }
}

void loss_value(const LossParams& p) {
  const float* s = p.statistics;
  double total = 0;
  for (int64_t i = 0; i < p.size; ++i) {
    const float z = p.phi[i * p.size + i] * p.scale + p.bias;
    for (int lines = 0; lines < 2; ++lines) {
      const float *largest = s + 2 * lines * p.size, *inverse = largest + p.size;
      const float log = inverse[i] == kInfinity ? -kInfinity : -logarithm(broadcast(inverse[i]))[0];
      total += (double)(largest[i] - z + log);
    }
  }
  *p.value = (float)(total / (2.0 * (double)p.size));
}

template <bool kSigmoid>
LossSums gradient_rows(const LossParams& p, int64_t first, int64_t last) {
  const int64_t size = p.size;
  const float share = p.grad_loss / (kSigmoid ? 1.0f : 2.0f) / (float)size;
  LossSums sums;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t begin = 0; begin < size; begin += kPartColumns) {
      V by_scale{}, by_bias{};
      for (int64_t c = begin; c < least(begin + kPartColumns, size); c += kLanes) {
        const Logits logits(p, row, c);
        const V z = logits.z;
        const I own = own_lane(row, c);
        V grad;
        if constexpr (kSigmoid) {
          grad = Softplus(select(own, -z, z)).derivative;
          grad = select(own, -grad, grad);
        } else {
          const float *rows = p.statistics + row, *columns = p.statistics + 2 * size + c;
          const V largest = load_live(columns, size - c, 0.0f), inverse = load_live(columns + size, size - c, 0.0f);
          grad = exponential(z - rows[0]) * rows[size] + exponential(z - largest) * inverse;
        }
        by_bias += grad;
        by_scale += grad * logits.phi;
        if (!kSigmoid) grad -= select(own, broadcast(2.0f), V{});
        store_live(p.grad_phi + row * size + c, grad * share * p.scale, size - c);
      }
      sums.scale += sum(by_scale);
      sums.bias += sum(by_bias);
    }
    if (!kSigmoid) {  // not in the lanes, where small numbers would be added to a large one
      sums.scale -= 2.0 * p.phi[row * size + row];
      sums.bias -= 2.0;
    }
  }
  sums.scale *= share;
  sums.bias *= share;
  return sums;
}

LossSums loss_gradient(const LossParams& p, int64_t first, int64_t last) {
  return p.sigmoid ? gradient_rows<true>(p, first, last) : gradient_rows<false>(p, first, last);
}

}  // namespace
