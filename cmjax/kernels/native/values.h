// Single values: rounding, bfloat16, the activation; plain loops over these become vector code of each form's CPU. And
// eight by eight of them.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

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
  const float r = MulAdd(n, 2.12194440e-4f, MulAdd(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = MulAdd(p, r, 1.3981999507e-3f);
  p = MulAdd(p, r, 8.3334519073e-3f);
  p = MulAdd(p, r, 4.1665795894e-2f);
  p = MulAdd(p, r, 1.6666665459e-1f);
  p = MulAdd(p, r, 5.0000001201e-1f);
  p = MulAdd(p * r, r, r + 1.0f);
  return p * FloatOf(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Of numbers from the smallest normal one up, after Cephes' logf.
inline float Log(float x) {
  const int32_t bits = static_cast<int32_t>(BitsOf(x)) - 0x3f3504f3;  // of the square root of a half
  const auto n = static_cast<float>(bits >> 23);
  const float r = FloatOf(static_cast<uint32_t>((bits & 0x7fffff) + 0x3f3504f3)) - 1.0f, square = r * r;
  float p = 7.0376836292e-2f;
  p = MulAdd(p, r, -1.1514610310e-1f);
  p = MulAdd(p, r, 1.1676998740e-1f);
  p = MulAdd(p, r, -1.2420140846e-1f);
  p = MulAdd(p, r, 1.4249322787e-1f);
  p = MulAdd(p, r, -1.6668057665e-1f);
  p = MulAdd(p, r, 2.0000714765e-1f);
  p = MulAdd(p, r, -2.4999993993e-1f);
  p = MulAdd(p, r, 3.3333331174e-1f);
  p = MulAdd(p * r, square, MulAdd(n, -2.12194440e-4f, -0.5f * square));
  return MulAdd(n, 0.693359375f, r + p);
}

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t Order __attribute__((vector_size(32)));

// The values of (a, b), which are counted through, in an order.
#if defined(__clang__)
#define CMJAX_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CMJAX_MIX(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

// Four values and four others.
inline Eight BothOf(const float* low, const float* high) {
#if defined(__AVX__)
  return (Eight)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
#else
  return Eight{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#endif
}

// to[0:8] are the columns of from[0:8, 0:8]: halves of rows are read to where they belong, then change places in pairs.
__attribute__((always_inline)) inline void TurnEight(const float* from, int64_t stride, Eight* to) {
  for (int c = 0; c < 8; c += 4) {
    Eight a[4], b[4];
    for (int i = 0; i < 4; ++i) a[i] = BothOf(from + i * stride + c, from + (i + 4) * stride + c);
    for (int i = 0; i < 4; i += 2) {
      b[i] = CMJAX_MIX(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      b[i + 1] = CMJAX_MIX(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
      to[c + 2 * i] = CMJAX_MIX(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      to[c + 2 * i + 1] = CMJAX_MIX(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
}

// to[0:8, 0:8] = from[0:8, 0:8], rows for columns.
inline void TurnEight(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Eight turned[8];
  TurnEight(from, from_stride, turned);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &turned[i], sizeof(Eight));
}

}  // namespace
}  // namespace cmjax
