// Sums over ranks, always in rank order, so that a result does not depend on who arrived first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "exchange.h"

namespace cmjax {

constexpr int64_t kSumBlockBytes = 4 << 10;

inline int SumBlocks(int64_t source_bytes) {
  return static_cast<int>((source_bytes + kSumBlockBytes - 1) / kSumBlockBytes);
}

// 16-bit floats are added as float32 and rounded once, to nearest even.
struct BFloat16 {
  uint16_t bits;
  float Load() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static BFloat16 Store(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((wide >> 16) | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

struct Float16 {
  uint16_t bits;
  float Load() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float value;
    if (exponent == 0) {
      value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static Float16 Store(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint16_t sign = (wide >> 16) & 0x8000;
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (wide >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (wide < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
      float magnitude;
      std::memcpy(&magnitude, &wide, 4);
      magnitude += 0.5f;
      std::memcpy(&wide, &magnitude, 4);
      return {static_cast<uint16_t>(sign | (wide - 0x3f000000u))};
    }
    return {static_cast<uint16_t>(sign | ((wide - 0x38000000u + 0xfff + ((wide >> 13) & 1)) >> 13))};
  }
};

// Integers wrap around, so they are added unsigned.
template <typename T>
struct Plain {
  T value;
  T Load() const { return value; }
  static Plain Store(T value) { return {value}; }
};

// Sums bytes [first, last) of every rank's source into `out`.
template <typename Element>
void SumRange(const std::vector<Seat>& seats, int64_t first, int64_t last, char* out) {
  using Acc = decltype(Element().Load());
  constexpr int64_t kMax = kSumBlockBytes / sizeof(Element);
  Acc acc[kMax];
  for (int64_t offset = first; offset < last; offset += kSumBlockBytes) {
    const int64_t count = std::min<int64_t>(last - offset, kSumBlockBytes) / static_cast<int64_t>(sizeof(Element));
    const Element* source = reinterpret_cast<const Element*>(seats[0].buffers.source + offset);
    for (int64_t i = 0; i < count; ++i) acc[i] = source[i].Load();
    for (size_t s = 1; s < seats.size(); ++s) {
      source = reinterpret_cast<const Element*>(seats[s].buffers.source + offset);
      for (int64_t i = 0; i < count; ++i) acc[i] = static_cast<Acc>(acc[i] + source[i].Load());
    }
    Element* target = reinterpret_cast<Element*>(out + (offset - first));
    for (int64_t i = 0; i < count; ++i) target[i] = Element::Store(acc[i]);
  }
}

inline void SumRangeOf(Sum sum, const std::vector<Seat>& seats, int64_t first, int64_t last, char* out) {
  switch (sum) {
    case Sum::kNone: return;
    case Sum::kS8:
    case Sum::kU8: return SumRange<Plain<uint8_t>>(seats, first, last, out);
    case Sum::kS16:
    case Sum::kU16: return SumRange<Plain<uint16_t>>(seats, first, last, out);
    case Sum::kS32:
    case Sum::kU32: return SumRange<Plain<uint32_t>>(seats, first, last, out);
    case Sum::kS64:
    case Sum::kU64: return SumRange<Plain<uint64_t>>(seats, first, last, out);
    case Sum::kBF16: return SumRange<BFloat16>(seats, first, last, out);
    case Sum::kF16: return SumRange<Float16>(seats, first, last, out);
    case Sum::kF32: return SumRange<Plain<float>>(seats, first, last, out);
    case Sum::kF64: return SumRange<Plain<double>>(seats, first, last, out);
  }
}

// Blocks [begin, end) of the sum, to every rank.
inline void SumToAll(Sum sum, std::vector<Seat>& seats, int64_t source_bytes, int begin, int end) {
  alignas(64) char block[kSumBlockBytes];
  for (int b = begin; b < end; ++b) {
    const int64_t first = b * kSumBlockBytes, last = std::min(source_bytes, first + kSumBlockBytes);
    SumRangeOf(sum, seats, first, last, block);
    for (Seat& seat : seats) std::memcpy(seat.buffers.target + first, block, last - first);
  }
}

// Ranks [begin, end) each receive their own share of the sum.
inline void SumToOwner(Sum sum, std::vector<Seat>& seats, int64_t source_bytes, int begin, int end) {
  const int64_t chunk = source_bytes / static_cast<int64_t>(seats.size());
  for (int d = begin; d < end; ++d) SumRangeOf(sum, seats, d * chunk, (d + 1) * chunk, seats[d].buffers.target);
}

}  // namespace cmjax
