// Single values: rounding, bfloat16, the activation. Plain loops over these become vector code of each form's CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace cmjax {
namespace {

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float Widen(uint16_t x) { return FloatOf(uint32_t{x} << 16); }

// To the nearest, ties to even.
inline uint16_t Narrow(float x) {
  const uint32_t bits = BitsOf(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float RoundBF16(float x) { return Widen(Narrow(x)); }

// a * b + c, rounded once where the CPU can.
inline float MulAdd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// To the nearest integer, ties to even, for |x| < 2^22.
inline float Round(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float Exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = Round(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * FloatOf(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

}  // namespace
}  // namespace cmjax
