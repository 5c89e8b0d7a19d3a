// Dot products in AVX-512 with its int8 instructions (VNNI), and those for bfloat16 where this file is compiled for them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "values.h"

namespace cmjax {
namespace {

// What sums of floats are made of, see columns.h.
struct Parts {
  static constexpr int kParts = 16, kLevels = 4;
  static constexpr int kOrder[kParts] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  static constexpr int kTileOfMany = 12, kManyVecs = 2;
  static constexpr int64_t kManyRows = 80;
  static __m512 Begin(const int32_t*) { return _mm512_setzero_ps(); }
  static __m512 Plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static void Store(__m512 acc, float* to) { _mm512_storeu_ps(to, acc); }
};

// Where a step of the matrix already consists of the units that rows are staged as.
struct Whole {
  using Unpacked = __m512i;
  static Unpacked Unpack(const void* w) { return _mm512_loadu_si512(w); }
  static void PutUnits(const Eight& units, float* to, int64_t) { std::memcpy(to, &units, sizeof(units)); }
};

// See dot_generic.h for what the members are.
struct DotF32 : Parts, Whole {
  using Many = DotF32;
  using W = float;
  using X = float;  // what staged rows hold
  using Sum = float;
  using WVec = __m512;
  using XVec = __m512;
  using Acc = __m512;
  static constexpr int kStep = 16, kRows = 6;
  static constexpr bool kHasOffset = false;
  static void Put(const float* from, int64_t padded, X* to) { std::memcpy(to, from, padded * sizeof(X)); }
  static constexpr int kLanes = 16, kTileVecs = 4, kTileRows = 6;
  static XVec Spread(float x) { return _mm512_set1_ps(x); }
  static XVec SpreadUnit(const float* unit) { return _mm512_set1_ps(*unit); }
  static WVec LoadW(const W* w) { return _mm512_loadu_ps(w); }
  static XVec LoadX(const X* x) { return _mm512_loadu_ps(x); }
  static Acc Add(Acc acc, XVec x, WVec w) { return _mm512_fmadd_ps(x, w, acc); }
  static Acc Offset(Acc acc, WVec) { return acc; }
};

#if defined(__AVX512BF16__)
struct DotBF16 : Parts, Whole {
  using Many = DotBF16;
  using W = uint16_t;
  using X = uint16_t;
  using Sum = float;
  using WVec = __m512bh;
  using XVec = __m512bh;
  using Acc = __m512;
  static constexpr int kStep = 32, kRows = 6, kLanes = 16;
  static constexpr bool kHasOffset = false;
  static void Put(const float* from, int64_t padded, X* to) {
    for (int64_t i = 0; i < padded; ++i) to[i] = Narrow(from[i]);
  }
  static __m512i Rounded(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
  // Floats rounded; and units of two columns of them.
  static void Round(const float* x, float* to) {
    _mm512_storeu_si512(to, _mm512_slli_epi32(Rounded(_mm512_loadu_ps(x)), 16));
  }
  static void PutPairs(const float* low, const float* high, float* to) {
    const __m512i above = _mm512_slli_epi32(Rounded(_mm512_loadu_ps(high)), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(above, Rounded(_mm512_loadu_ps(low))));
  }
  static XVec SpreadUnit(const float* unit) { return (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*unit)); }
  static WVec LoadW(const W* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static XVec LoadX(const X* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static Acc Add(Acc acc, XVec x, WVec w) { return _mm512_dpbf16_ps(acc, x, w); }
  static Acc Offset(Acc acc, WVec) { return acc; }
};
#else
// Pairs are taken apart in registers, the even and then the odd values of 32, and rows are staged in that order.
struct DotBF16 : Whole {
  using Many = DotF32;
  using W = uint16_t;
  using X = float;
  using Sum = float;
  using WVec = __m512i;
  struct XVec {
    __m512 even, odd;
  };
  using Acc = __m512;
  static constexpr int kStep = 32, kRows = 5, kLanes = 16;
  static constexpr bool kHasOffset = false;
  static WVec LoadW(const W* w) { return _mm512_loadu_si512(w); }
  static XVec LoadX(const X* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }
  static __m512 Even(WVec w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
  static __m512 Odd(WVec w) { return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000))); }
  static Acc Add(Acc acc, XVec x, WVec w) {
    return _mm512_fmadd_ps(x.odd, Odd(w), _mm512_fmadd_ps(x.even, Even(w), acc));
  }
  static void PutUnits(const Eight& pairs, float* to, int64_t next) {
    const __m256i w = (__m256i)pairs;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_slli_epi32(w, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + next), _mm256_and_si256(w, _mm256_set1_epi32(0xffff0000)));
  }
  static Acc Offset(Acc acc, WVec) { return acc; }
  static void Put(const float* from, int64_t padded, X* to) {
    for (int64_t block = 0; block < padded; block += 32) {
      for (int64_t i = 0; i < 16; ++i) {
        to[block + i] = from[block + 2 * i];
        to[block + 16 + i] = from[block + 2 * i + 1];
      }
    }
  }
};
#endif

// The instruction multiplies unsigned by signed: rows are staged with 128 added, which the sums of the weights undo.
struct DotS8 : Whole {
  using Many = DotS8;
  using W = int8_t;
  using X = uint8_t;
  using Sum = int32_t;
  using WVec = __m512i;
  using XVec = __m512i;
  using Acc = __m512i;
  static constexpr int kStep = 64, kRows = 4, kLanes = 16;
  static constexpr int kParts = 1, kLevels = 1, kOrder[] = {0}, kTileOfMany = 12, kManyVecs = 2;
  static constexpr int64_t kManyRows = 24;
  static constexpr bool kHasOffset = true;
  static Acc Begin(const int32_t* offsets) { return _mm512_loadu_si512(offsets); }
  static Acc Plus(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static void Store(Acc acc, int32_t* to) { _mm512_storeu_si512(to, acc); }
  static XVec SpreadUnit(const float* unit) { return _mm512_castps_si512(_mm512_set1_ps(*unit)); }
  static WVec LoadW(const W* w) { return _mm512_loadu_si512(w); }
  static XVec LoadX(const X* x) { return _mm512_loadu_si512(x); }
  // By the intrinsic, GCC 12 moves each sum out and in again around every instruction, a third of the time.
  static Acc Add(Acc acc, XVec x, WVec w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }
  static Acc Offset(Acc acc, WVec w) { return Add(acc, _mm512_set1_epi8(1), w); }
  static X Stage(int value) { return static_cast<X>(value + 128); }
};

inline __m128 FoldFloats(__m512 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128i FoldInts(__m512i v) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Totals of the four columns of one row, by one transposition.
template <class D>
inline void Totals(const __m512* a, const __m512*, float* out) {
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
  _mm_storeu_ps(out, FoldFloats(all));
}

template <class D>
inline void Totals(const __m512i* acc, const __m512i* offset, int32_t* out) {
  __m512i a[4];
  for (int o = 0; o < 4; ++o) a[o] = _mm512_sub_epi32(acc[o], _mm512_slli_epi32(offset[o], 7));
  const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), FoldInts(all));
}

}  // namespace
}  // namespace cmjax
