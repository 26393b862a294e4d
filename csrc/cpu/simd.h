// Vectors as wide as those of the instruction set this file is compiled for, from the compiler's vector extensions.
// Everything is internal to the including file, so that the linker shares nothing between instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__) || defined(PACL_EMULATE_AMX)
constexpr int kLanes = 16, kTileRows = 14, kTileColumns = 8;  // 32 registers: 14 x 2 sums, 2 loads, 1 broadcast
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 6, kTileColumns = 4;  // 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 14, kTileColumns = 8;  // 32 registers
#else
constexpr int kLanes = 4, kTileRows = 6, kTileColumns = 4;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a panel: two vectors

typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// Returns 0, 1, 2 and so on.
inline I lane_numbers() {
  I lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Copies with non-temporal stores where the machine has them, for data that is not read again soon. A large result is
// then not first read from memory only to be overwritten. store_fence() makes such copies visible to other threads.
inline void copy_non_temporal(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  if (((uintptr_t)to & 63) == 0) {
#if defined(__AVX512F__)
    for (; bytes >= 64; bytes -= 64, to = (char*)to + 64, from = (const char*)from + 64)
      _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#else
    for (; bytes >= 64; bytes -= 64, to = (char*)to + 64, from = (const char*)from + 64)
      for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)to + i, _mm_loadu_si128((const __m128i*)from + i));
#endif
  }
#endif
  memcpy(to, from, bytes);
}
inline void store_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline V broadcast(float x) { return x - V{}; }  // V{} + x would keep an addition: -0.0 + 0.0 is not -0.0

// Returns a b + c, rounded once where the processor has FMA. The compiler fuses nothing by itself (-ffp-contract=off):
// a product fused into a difference leaves its rounding error where the result should be 0, and dividing by the
// temperature enlarges it.
inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(PACL_EMULATE_AMX)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline V fma(V a, float b, V c) { return fma(a, broadcast(b), c); }
inline V fma(V a, float b, float c) { return fma(a, broadcast(b), broadcast(c)); }
inline I bits(V v) {
  I i;
  memcpy(&i, &v, sizeof i);
  return i;
}
inline V from_bits(I i) {
  V v;
  memcpy(&v, &i, sizeof v);
  return v;
}
inline V select(I mask, V yes, V no) { return from_bits((mask & bits(yes)) | (~mask & bits(no))); }
inline V maximum(V a, V b) { return select(a > b, a, b); }
inline float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

// Returns 2^(n + f) for an integer n, which is in the low bits of `shifted` = n + kRound.
constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent's bias of 127
inline V exp2_parts(V shifted, V f) {
  V p = fma(f, 1.5345811977e-4f, 1.3399931386e-3f);  // minimax in relative error on [-1/2, 1/2]
  p = fma(p, f, broadcast(9.6184889587e-3f));
  p = fma(p, f, broadcast(5.5503287766e-2f));
  p = fma(p, f, broadcast(2.4022646891e-1f));
  p = fma(p, f, broadcast(6.9314720574e-1f));
  p = fma(p, f, broadcast(1.0f));
  return p * from_bits(bits(shifted) << 23);  // a product, not a sum of exponents: NaN times anything is NaN
}

// Returns 2^x for x < 127, relative error below 1e-7; NaN stays NaN. Without kClamp, x must be above -126. With it, x
// below -126.5 gives exactly 0: a later factor of 1 / τ would make a merely small number large again.
template <bool kClamp>
inline V exp2(V x) {
  if (kClamp) x = select(x < broadcast(-127.0f), broadcast(-127.0f), x);
  const V shifted = x + kRound;
  return exp2_parts(shifted, x - (shifted - kRound));
}

// Returns 2^(x scale). The product is rounded only with kClamp.
template <bool kClamp>
inline V exp2(V x, float scale) {
  if (kClamp) return exp2<true>(x * scale);
  const V shifted = fma(x, broadcast(scale), broadcast(kRound));
  return exp2_parts(shifted, fma(x, broadcast(scale), kRound - shifted));
}

// Returns log x of a positive, normal x (Cephes' logf), relative error about 1e-7.
inline V logarithm(V x) {
  I exponent = ((bits(x) - 0x3F3504F3) >> 23);  // puts the mantissa into [sqrt(1/2), sqrt(2))
  V f = from_bits(bits(x) - (exponent << 23)) - 1.0f;
  V n = __builtin_convertvector(exponent, V);
  V p = fma(f, 7.0376836292e-2f, -1.1514610310e-1f);
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  V square = f * f;
  V y = p * f * square + n * -2.12194440e-4f - 0.5f * square;
  V result = f + y + n * 0.693359375f;
  return select(x != x, x, result);
}

// Transposes a square of kLanes x kLanes units; strides in units.
#if defined(__clang__)
template <int... N>
struct Lanes {};
template <int N, int... Rest>
struct CountLanes : CountLanes<N - 1, N - 1, Rest...> {};
template <int... N>
struct CountLanes<0, N...> {
  typedef Lanes<N...> type;
};
template <int kHalf, int... N>
inline void exchange(V& a, V& b, Lanes<N...>) {
  V low = __builtin_shufflevector(a, b, ((N & kHalf) ? kLanes + N - kHalf : N)...);
  b = __builtin_shufflevector(a, b, ((N & kHalf) ? kLanes + N : N + kHalf)...);
  a = low;
}
template <int kHalf>
inline void exchange(V& a, V& b) {
  exchange<kHalf>(a, b, typename CountLanes<kLanes>::type());
}
#else
template <int kHalf>
inline void exchange(V& a, V& b) {
  I low{}, high{};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & kHalf) ? kLanes + i - kHalf : i;
    high[i] = (i & kHalf) ? kLanes + i : i + kHalf;
  }
  V first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}
#endif

template <int kHalf>
inline void exchange_rows(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kHalf)) exchange<kHalf>(rows[i], rows[i + kHalf]);
  if constexpr (kHalf > 1) exchange_rows<kHalf / 2>(rows);
}

inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  V rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * in_stride);
  exchange_rows<kLanes / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, rows[i]);
}

}  // namespace
