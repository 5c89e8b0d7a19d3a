// One form of the inner loops, for the CPU that the compiler is told: this file is compiled once for each. It uses no
// templates of the standard library, whose copies for one CPU the linker could hand to another form.
#include <cstring>

#include "kernels.h"
#include "values.h"
#if defined(__AVX512VNNI__)
#include "dot_avx512.h"
#else
#include "dot_generic.h"
#endif

#ifndef CMJAX_FORM
#define CMJAX_FORM Portable
#endif
#define CMJAX_JOIN(a, b) a##b
#define CMJAX_NAMED(a, b) CMJAX_JOIN(a, b)
#define CMJAX_TEXT(a) #a
#define CMJAX_QUOTED(a) CMJAX_TEXT(a)

namespace cmjax {
namespace {

#include "columns.h"

// -- staging ----------------------------------------------------------------------------------------------------------

inline float ScaleOf(const Rows& rows, int64_t row) {
  if (rows.scales != nullptr) return rows.scales[row];
  float scale;
  std::memcpy(&scale, rows.data + row * rows.stride + rows.scale_at, sizeof(scale));
  return scale;
}

// One row as floats, rounded to `dtype`.
inline void ReadRow(const Rows& rows, int64_t row, Type dtype, float* out) {
  const char* at = rows.data + row * rows.stride;
  const int64_t width = rows.width;
  if (rows.type == Type::kF32) {
    std::memcpy(out, at, width * sizeof(float));
  } else if (rows.type == Type::kBF16) {
    for (int64_t i = 0; i < width; ++i) {
      uint16_t value;
      std::memcpy(&value, at + 2 * i, sizeof(value));
      out[i] = Widen(value);
    }
  } else {
    const float scale = ScaleOf(rows, row);
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(reinterpret_cast<const int8_t*>(at)[i]) * scale;
  }
  if (dtype == Type::kBF16) {
    for (int64_t i = 0; i < width; ++i) out[i] = Widen(Narrow(out[i]));
  }
}

inline void PutFloats(const float* from, int64_t width, float* to) { std::memcpy(to, from, width * sizeof(float)); }
inline void PutFloats(const float* from, int64_t width, uint16_t* to) {
  for (int64_t i = 0; i < width; ++i) to[i] = Narrow(from[i]);
}

// Quantizes one row: its scale, and the values as `put` makes them.
template <class T, class Put>
inline float PutInts(const float* from, int64_t width, T* to, Put put) {
  uint32_t most = 0;  // sizes of floats compare as their bits do, NaN above all
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t bits = BitsOf(from[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const float scale = FloatOf(most) * (1.0f / 127.0f), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < width; ++i) to[i] = put(static_cast<int32_t>(Round(from[i] * inverse)));
  return scale;
}

float Quantize(const Rows& rows, int64_t row, int8_t* to, float* floats) {
  ReadRow(rows, row, Type::kF32, floats);
  return PutInts(floats, rows.width, to, [](int32_t value) { return static_cast<int8_t>(value); });
}

// One staged row, by lane if it is to be.
template <class D>
inline void PutStaged(float* floats, int64_t width, bool is_by_lane, char* to) {
  const int64_t padded = Padded(width);
  D::Put(floats, padded, reinterpret_cast<typename D::X*>(to));
  if (!is_by_lane) return;
  std::memcpy(floats, to, padded * sizeof(typename D::X));
  PutByLane<D>(floats, width, reinterpret_cast<float*>(to));
}

void Stage(const Rows& rows, int64_t first, int64_t count, Type weights, Type dtype, const Staged& staged,
           float* floats) {
  const int64_t width = rows.width, padded = Padded(width);
  for (int64_t r = 0; r < count; ++r) {
    char* to = staged.data + r * staged.stride;
    if (weights == Type::kS8 && rows.type == Type::kS8) {
      const auto* from = reinterpret_cast<const int8_t*>(rows.data + (first + r) * rows.stride);
      auto* row = reinterpret_cast<DotS8::X*>(to);
      for (int64_t i = 0; i < width; ++i) row[i] = DotS8::Stage(from[i]);
      for (int64_t i = width; i < padded; ++i) row[i] = DotS8::Stage(0);
      staged.scales[r] = ScaleOf(rows, first + r);
      continue;
    }
    ReadRow(rows, first + r, weights == Type::kS8 ? Type::kF32 : dtype, floats);
    std::memset(floats + width, 0, (padded - width) * sizeof(float));
    if (weights == Type::kF32) PutStaged<DotF32>(floats, width, staged.is_by_lane, to);
    if (weights == Type::kBF16) PutStaged<DotBF16>(floats, width, staged.is_by_lane, to);
    if (weights == Type::kS8) {
      staged.scales[r] = PutInts(floats, padded, reinterpret_cast<DotS8::X*>(to), DotS8::Stage);
    }
  }
}

template <class D>
constexpr Tiling TilingOf() {
  using M = typename D::Many;
  constexpr bool is_float = sizeof(typename D::W) > 1;
  return {D::kStep, D::kRows, M::kManyRows, M::kTileOfMany, is_float && sizeof(typename D::X) == sizeof(typename D::W)};
}

// -- products ---------------------------------------------------------------------------------------------------------

// sums[r, 0:4] for R rows and four columns; fewer columns repeat their last.
template <class D, int R>
inline void Tile(const char* x, int64_t stride, const typename D::W* const* w, int64_t in, typename D::Sum* sums,
                 int64_t width) {
  using W = typename D::W;
  typename D::Acc acc[R][4], offset[4];
  for (int o = 0; o < 4; ++o) {
    offset[o] = typename D::Acc{};
    for (int r = 0; r < R; ++r) acc[r][o] = typename D::Acc{};
  }
  const auto add = [&](int64_t at, const typename D::WVec* wv) __attribute__((always_inline)) {
    for (int r = 0; r < R; ++r) {
      const auto xv = D::LoadX(reinterpret_cast<const typename D::X*>(x + r * stride) + at);
      for (int o = 0; o < 4; ++o) acc[r][o] = D::Add(acc[r][o], xv, wv[o]);
    }
    if (D::kHasOffset) {
      for (int o = 0; o < 4; ++o) offset[o] = D::Offset(offset[o], wv[o]);
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= in; i += D::kStep) {
    // The next four columns, which lie behind these: the hardware does not see four streams as one.
    for (int o = 0; o < 4; ++o) __builtin_prefetch(w[o] + i + 4 * in);
    const typename D::WVec wv[4] = {D::LoadW(w[0] + i), D::LoadW(w[1] + i), D::LoadW(w[2] + i), D::LoadW(w[3] + i)};
    add(i, wv);
  }
  if (i < in) {
    W part[4][D::kStep] = {};
    for (int o = 0; o < 4; ++o) std::memcpy(part[o], w[o] + i, (in - i) * sizeof(W));
    const typename D::WVec wv[4] = {D::LoadW(part[0]), D::LoadW(part[1]), D::LoadW(part[2]), D::LoadW(part[3])};
    add(i, wv);
  }
  for (int r = 0; r < R; ++r) Totals<D>(acc[r], offset, sums + r * width);
}

// By number of rows, from one on.
template <class D>
constexpr void (*kTiles[])(const char*, int64_t, const typename D::W* const*, int64_t, typename D::Sum*, int64_t) = {
    Tile<D, 1>, Tile<D, 2>, Tile<D, 3>, Tile<D, 4>, Tile<D, 5>, Tile<D, 6>};

// sums[0:num_rows, 0:count] for outputs from `first` on; `width`, from one row of sums to the next, is a multiple of 4.
template <class D>
void Sums(const Staged& rows, int64_t num_rows, const Matrix& matrix, int64_t first, int64_t count,
          typename D::Sum* sums, int64_t width) {
  using W = typename D::W;
  for (int64_t col = 0; col < count; col += 4) {
    const W* w[4];
    for (int64_t o = 0; o < 4; ++o) {
      w[o] = reinterpret_cast<const W*>(matrix.data) + (first + Least(col + o, count - 1)) * matrix.in;
    }
    for (int64_t r = 0; r < num_rows;) {
      // The fewest tiles, of about one size.
      const int64_t tiles = (num_rows - r + D::kRows - 1) / D::kRows, here = (num_rows - r + tiles - 1) / tiles;
      kTiles<D>[here - 1](rows.data + r * rows.stride, rows.stride, w, matrix.in, sums + r * width + col, width);
      r += here;
    }
  }
}

// sums[0:num_rows, 0:count], kColBlock wide, as floats: those of int8 values have scales.
template <class D>
inline void Scale(const Staged& rows, int64_t num_rows, const Matrix& w, int64_t first, int64_t count, char* sums) {
  if constexpr (sizeof(typename D::W) == 1) {
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t c = 0; c < count; ++c) {
        char* at = sums + (r * kColBlock + c) * 4;
        int32_t sum;
        std::memcpy(&sum, at, sizeof(sum));
        const float value = static_cast<float>(sum) * rows.scales[r] * w.scale[first + c];
        std::memcpy(at, &value, sizeof(value));
      }
    }
  }
}

// The product's values as floats, [num_rows, kColBlock], `count` of them at most as many; `memory` is scratch memory.
template <class D>
void Values(const Staged& rows, int64_t num_rows, const Matrix& w, int64_t first, int64_t count, char* out,
            char* memory) {
  auto* sums = reinterpret_cast<typename D::Sum*>(out);
  if (!rows.is_by_lane) Sums<D>(rows, num_rows, w, first, count, sums, kColBlock);
  for (int64_t col = 0; rows.is_by_lane && col < count; col += Columns<D>::kCols) {
    const Columns<D> columns(w, first + col, Least(Columns<D>::kCols, count - col), memory);
    columns.Sums(rows, num_rows, sums + col, kColBlock);
  }
  Scale<D>(rows, num_rows, w, first, count, out);
}

inline void Write(const float* values, int64_t num_rows, int64_t row, int64_t col, int64_t count, const Target& target) {
  for (int64_t r = 0; r < num_rows; ++r) {
    char* to = target.data + ((row + r) * target.width + col) * ItemBytes(target.type);
    if (target.type == Type::kF32) {
      PutFloats(values + r * kColBlock, count, reinterpret_cast<float*>(to));
    } else {
      PutFloats(values + r * kColBlock, count, reinterpret_cast<uint16_t*>(to));
    }
  }
}

template <class D>
void ProductOf(const Staged& rows, int64_t num_rows, const Matrix& w, int64_t first, int64_t count,
               const Target& target, char* scratch) {
  // Of some columns: for each block of rows, about as large as the others, what `put` makes the sums.
  const auto each_block = [&](int64_t begin, int64_t end, int64_t col, int64_t cols, const auto& put) {
    const int64_t blocks = (end - begin + kRowBlock - 1) / kRowBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = begin + (end - begin) * i / blocks, here = begin + (end - begin) * (i + 1) / blocks - row;
      float* scales = rows.scales == nullptr ? nullptr : rows.scales + row;
      const Staged block{rows.data + row * rows.stride, rows.stride, scales, rows.is_by_lane};
      put(block, here, reinterpret_cast<typename D::Sum*>(scratch));
      Scale<D>(block, here, w, col, cols, scratch);
      Write(reinterpret_cast<float*>(scratch), here, row, col, cols, target);
    }
  };
  if (!rows.is_by_lane) {
    for (int64_t col = first; col < first + count; col += kColBlock) {
      const int64_t cols = Least(kColBlock, first + count - col);
      each_block(0, num_rows, col, cols, [&](const Staged& block, int64_t here, typename D::Sum* sums) {
        Sums<D>(block, here, w, col, cols, sums, kColBlock);
      });
    }
    return;
  }
  const int64_t groups =
      Least((num_rows * rows.stride + kRowsBytes - 1) / kRowsBytes, (num_rows + kManyBlock - 1) / kManyBlock);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t col = first; col < first + count; col += Columns<D>::kCols) {
      const int64_t cols = Least(Columns<D>::kCols, first + count - col);
      const Columns<D> columns(w, col, cols, scratch + kRowBlock * kColBlock * 4);
      each_block(num_rows * g / groups, num_rows * (g + 1) / groups, col, cols,
                 [&](const Staged& block, int64_t here, typename D::Sum* sums) {
                   columns.Sums(block, here, sums, kColBlock);
                 });
    }
  }
}

void Product(const Staged& rows, int64_t num_rows, const Matrix& w, int64_t first, int64_t count, const Target& target,
             char* scratch) {
  if (w.type == Type::kF32) ProductOf<DotF32>(rows, num_rows, w, first, count, target, scratch);
  if (w.type == Type::kBF16) ProductOf<DotBF16>(rows, num_rows, w, first, count, target, scratch);
  if (w.type == Type::kS8) ProductOf<DotS8>(rows, num_rows, w, first, count, target, scratch);
}

void Expert(const Rows& rows, int64_t first, int64_t num_rows, bool is_by_lane, const Matrix& w13, const Matrix& w2,
            const Target& target, char* scratch) {
  const int64_t ffn = w2.in, middle_stride = Padded(ffn);
  const auto take = [&scratch](int64_t bytes) {
    char* taken = scratch;
    scratch += Padded(bytes);
    return taken;
  };
  const auto staged = [&](int64_t width) {
    char* data = take(num_rows * StagedStride(width));
    return Staged{data, StagedStride(width), reinterpret_cast<float*>(take(num_rows * 4)), is_by_lane};
  };
  const Staged in = staged(rows.width), between = staged(ffn);
  auto* middle = reinterpret_cast<float*>(take(num_rows * middle_stride * 4));
  auto* floats = reinterpret_cast<float*>(take(StagedStride(rows.width > ffn ? rows.width : ffn)));
  char *gate = take(num_rows * kColBlock * 4), *up = take(num_rows * kColBlock * 4);

  const auto values = w13.type == Type::kF32 ? Values<DotF32> : w13.type == Type::kBF16 ? Values<DotBF16> : Values<DotS8>;
  Stage(rows, first, num_rows, w13.type, target.type, in, floats);
  for (int64_t col = 0; col < ffn; col += kColBlock) {
    const int64_t cols = Least(kColBlock, ffn - col);
    values(in, num_rows, w13, col, cols, gate, scratch);
    values(in, num_rows, w13, ffn + col, cols, up, scratch);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* g = reinterpret_cast<const float*>(gate) + r * kColBlock;
      const float* u = reinterpret_cast<const float*>(up) + r * kColBlock;
      float* m = middle + r * middle_stride + col;
      if (target.type == Type::kBF16) {
        for (int64_t c = 0; c < cols; ++c) {
          // Rounded as often as the same steps in bfloat16 are.
          const float gate_value = RoundBF16(g[c]);
          m[c] = RoundBF16(RoundBF16(gate_value * RoundBF16(Sigmoid(gate_value))) * RoundBF16(u[c]));
        }
      } else {
        for (int64_t c = 0; c < cols; ++c) m[c] = g[c] * Sigmoid(g[c]) * u[c];
      }
    }
  }
  const Rows middle_rows{reinterpret_cast<const char*>(middle), middle_stride * 4, ffn, Type::kF32, nullptr, 0};
  Stage(middle_rows, 0, num_rows, w2.type, Type::kF32, between, floats);
  Product(between, num_rows, w2, 0, w2.out, target, scratch);
}

#include "panels.h"
#include "attention.h"
#include "expanded.h"
#include "routing.h"
#include "sampling.h"

}  // namespace

extern const Form CMJAX_NAMED(k, CMJAX_FORM);
const Form CMJAX_NAMED(k, CMJAX_FORM) = {
    CMJAX_QUOTED(CMJAX_FORM), {TilingOf<DotF32>(), TilingOf<DotBF16>(), TilingOf<DotS8>()}, Stage, Product, Expert,
    Quantize, Norm, Choose, Absorb, Attend, Release, AttendExpanded, Sample};

}  // namespace cmjax
