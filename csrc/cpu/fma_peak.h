// Independent FMAs, as many as the registers hold. Their rate is the peak to which products are compared.
#pragma once

#include "units.h"

namespace {

template <class Op>
double independent_fmas(int64_t repeats) {
#if defined(PACL_MATRIX_UNIT)
  if constexpr (Op::kMatrix) {
    const MatrixUnit session;
    matrix_zero<4>();  // changing operands would lower the clock by up to a quarter
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
  volatile float keep = sum(total);  // keeps the compiler from dropping the loop
  (void)keep;
  return 2.0 * Op::kPair * kLanes * kChains * repeats;
}

}  // namespace
