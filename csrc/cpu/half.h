// Conversions of one float32 from and to the 16-bit types, in integer arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

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
  float f = float_from_bits(magnitude) * float_from_bits(239u << 23);  // 2^112 shifts the exponent, also of denormals
  uint32_t special = (x & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;         // infinity and NaN
  return float_from_bits(float_bits(f) | special | sign);
}
inline uint16_t to_float16(float f) {
  uint32_t i = float_bits(f), sign = (i >> 16) & 0x8000;
  i &= 0x7FFFFFFF;
  if (i > 0x7F800000) return (uint16_t)(sign | 0x7E00);
  if (i >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // rounds to 65536 or more
  if (i < 0x38800000) {                                   // denormal: the addition rounds it
    float g = float_from_bits(i) + 0.5f;
    return (uint16_t)(sign | (float_bits(g) - 0x3F000000));
  }
  return (uint16_t)(sign | ((i - 0x38000000 + 0xFFF + ((i >> 13) & 1)) >> 13));
}

}  // namespace
