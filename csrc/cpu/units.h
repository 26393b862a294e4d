// The two kinds of product. A unit is 4 bytes: one float32, or two adjacent bfloat16 whose products are summed.
#pragma once

#include "matrix.h"
#include "simd.h"

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(PACL_EMULATE_AMX)
#define PACL_PAIRS
#endif

namespace {

// A product takes kInner units at a time and whole tiles of kRows x kPanel. With kMatrix it runs in the processor's
// matrix unit, which a Session opens. kInnerBlock: units of a right-hand panel that stay in the L1 cache. kColumns:
// columns of a tile's left operand in the texts' gradient.
struct Float32 {
  static constexpr bool kMatrix = false;
  static constexpr int kPair = 1, kInner = 4, kRows = kTileRows, kColumns = kTileColumns, kInnerBlock = 128;
  struct Session {
    ~Session() {}  // not trivial, to avoid an unused-variable warning
  };
  static V broadcast_unit(const float* p) { return broadcast(*p); }
  static V multiply_add(V sum, V a, V b) { return fma(a, b, sum); }
};

#if defined(PACL_PAIRS)
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

#if defined(__AVX512BF16__)
inline H round_to_bfloat16(V v) { return (H)_mm512_cvtneps_pbh(v); }
inline I zero_extend(H h) { return (I)_mm512_cvtepu16_epi32((__m256i)h); }  // GCC's own conversion takes two halves
#else
inline I zero_extend(H h) { return __builtin_convertvector(h, I); }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline H round_to_bfloat16(V v) { return (H)vcvt_bf16_f32((float32x4_t)v); }
#else
inline H round_to_bfloat16(V v) {
  const I i = bits(v), rounded = i + 0x7FFF + ((i >> 16) & 1), quiet = i | 0x400000;
  return __builtin_convertvector(((v == v ? rounded : quiet) >> 16) & 0xFFFF, H);
}
#endif
#endif

inline V from_bfloat16(H h) { return from_bits(zero_extend(h) << 16); }

struct BFloat16 {
  static constexpr int kPair = 2;
#if defined(PACL_MATRIX_UNIT)
  static constexpr bool kMatrix = true;
  static constexpr int kInner = kMatrixUnits, kRows = kMatrixRows, kColumns = kPanel, kInnerBlock = 256;
  typedef MatrixUnit Session;
#else
  static constexpr bool kMatrix = false;
  static constexpr int kInner = 4, kRows = kTileRows, kColumns = kTileColumns, kInnerBlock = 128;
  typedef Float32::Session Session;
#endif
  static V broadcast_unit(const float* p) {
    int32_t unit;
    memcpy(&unit, p, sizeof unit);
    return from_bits(unit - I{});
  }
#if defined(__AVX512BF16__)
  static V multiply_add(V sum, V a, V b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  static V multiply_add(V sum, V a, V b) { return (V)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
#else
  static V multiply_add(V sum, V a, V b) {
    constexpr int32_t kHigh = (int32_t)0xFFFF0000;
    sum = fma(from_bits(bits(a) << 16), from_bits(bits(b) << 16), sum);
    return fma(from_bits(bits(a) & kHigh), from_bits(bits(b) & kHigh), sum);
  }
#endif
};

// Packs the elements of two rows into units, the first row in the low halves.
inline V interleave_bfloat16(V low, V high) {
  return from_bits(zero_extend(round_to_bfloat16(low)) | zero_extend(round_to_bfloat16(high)) << 16);
}
#endif

}  // namespace
