// Dot products in the compiler's own vectors: any CPU, and AVX2 where this file is compiled for it.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cmjax {
namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class V>
inline V LoadAs(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class V, class T>
inline T SumOf(V v) {
  T sum[8];
  std::memcpy(sum, &v, sizeof(sum));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Products of many rows, see columns.h: from how many on, and rows and vectors of columns at a time. Without AVX2 the plain
// loops were faster.
struct Tiles {
  static constexpr int kTileOfMany = 6, kManyVecs = 2;
#if defined(__AVX2__)
  static constexpr int64_t kManyRows = 24;
#else
  static constexpr int64_t kManyRows = INT64_MAX;
#endif
};

// A kind of matrix: what it holds (W), what the rows are staged as (X), and sums of their products, kStep at a time for
// kRows rows at once. Put stages a row of floats that is padded with zeros. For columns.h: how products of many rows are
// summed (Many); a step of the matrix (Unpack), and those 32 bits of eight columns as units of X, which follow each other
// (PutUnits); the parts of a sum and the order in which they are added; what a sum begins with; one unit for all lanes.
struct DotF32 : Tiles {
  using Many = DotF32;
  using W = float;
  using X = float;  // what staged rows hold
  using Sum = float;
  using WVec = Floats;
  using XVec = Floats;
  using Acc = Floats;
  static constexpr int kStep = 8, kRows = 3;
#if defined(__AVX2__)
  static constexpr int kLanes = 8, kTileVecs = 2, kTileRows = 6;
#else
  static constexpr int kLanes = 8, kTileVecs = 1, kTileRows = 4;
#endif
  static constexpr int kParts = 8, kLevels = 3, kOrder[kParts] = {0, 4, 2, 6, 1, 5, 3, 7};
  static Acc Begin(const int32_t*) { return Floats{}; }
  static Acc Plus(Acc a, Acc b) { return a + b; }
  using Unpacked = Floats;
  static Unpacked Unpack(const W* w) { return LoadW(w); }
  static void PutUnits(const Eight& units, float* to, int64_t) { std::memcpy(to, &units, sizeof(units)); }
  static XVec Spread(float x) { return Floats{} + x; }
  static XVec SpreadUnit(const float* unit) { return Spread(*unit); }
  static void Store(Acc acc, float* to) { std::memcpy(to, &acc, sizeof(acc)); }
  static WVec LoadW(const W* w) { return LoadAs<Floats>(w); }
  static XVec LoadX(const X* x) { return LoadAs<Floats>(x); }
  static Acc Add(Acc acc, XVec x, WVec w) {
#if defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)acc);
#else
    return acc + x * w;
#endif
  }
  static void Put(const float* from, int64_t padded, X* to) { std::memcpy(to, from, padded * sizeof(X)); }
  static Sum Total(Acc acc, Acc) { return SumOf<Floats, float>(acc); }
  static constexpr bool kHasOffset = false;
  static Acc Offset(Acc acc, WVec) { return acc; }
};

struct DotBF16 : DotF32 {
  using W = uint16_t;
  static WVec LoadW(const W* w) {
    const Ints wide = (Ints)__builtin_convertvector(LoadAs<Halves>(w), Ints) << 16;
    return (Floats)wide;
  }
  static Unpacked Unpack(const W* w) { return LoadW(w); }
};

struct DotS8 : Tiles {
  using Many = DotS8;
  using W = int8_t;
  using X = int16_t;
  using Sum = int32_t;
  using Acc = Ints;
  using WVec = Shorts;
  using XVec = Shorts;
  static constexpr int kStep = 16, kRows = 3, kLanes = 8;
  static constexpr int kParts = 1, kLevels = 1, kOrder[] = {0};
  static Acc Begin(const int32_t*) { return Ints{}; }
  static Acc Plus(Acc a, Acc b) { return a + b; }
  static void Store(Acc acc, int32_t* to) { std::memcpy(to, &acc, sizeof(acc)); }
  using Unpacked = Shorts;
  static Unpacked Unpack(const W* w) { return LoadW(w); }
  static void PutUnits(const Eight& units, float* to, int64_t) { std::memcpy(to, &units, sizeof(units)); }
  static XVec SpreadUnit(const float* unit) {
    int32_t pair;
    std::memcpy(&pair, unit, sizeof(pair));
    return (Shorts)(Ints{} + pair);
  }
  static WVec LoadW(const W* w) { return __builtin_convertvector(LoadAs<Bytes>(w), Shorts); }
  static XVec LoadX(const X* x) { return LoadAs<Shorts>(x); }
  static Acc Add(Acc acc, XVec x, WVec w) {
#if defined(__AVX2__)
    return acc + (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#else
    const Ints pairs = (Ints)(x * w);  // products of two int8 values fit int16
    return acc + ((pairs << 16) >> 16) + (pairs >> 16);
#endif
  }
  static Sum Total(Acc acc, Acc) { return SumOf<Ints, int32_t>(acc); }
  static constexpr bool kHasOffset = false;
  static Acc Offset(Acc acc, WVec) { return acc; }
  static X Stage(int value) { return static_cast<X>(value); }
};

// Totals of the four columns of one row.
template <class D>
inline void Totals(const typename D::Acc* acc, const typename D::Acc* offset, typename D::Sum* out) {
  for (int o = 0; o < 4; ++o) out[o] = D::Total(acc[o], offset[o]);
}

}  // namespace
}  // namespace cmjax
