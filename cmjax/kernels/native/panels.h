// Products with the vectors along the columns, and what a softmax makes of a row of scores, of one form: part of form.cc.
//
// c = a * b, where a value of c is one sum in the order of a's units: a row of `a` holds units (see columns.h), one of
// which is spread over a vector; a row of `b` holds one unit of every column.
#pragma once

// acc[0:R, 0:V vectors] += a[0:R, 0:count] * b[0:count, 0:V vectors].
template <class M, int R, int V>
__attribute__((always_inline)) inline void Gather(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                                  int64_t count, typename M::Acc (&acc)[R][V]) {
  for (int64_t k = 0; k < count; ++k) {
    typename M::XVec row[V];
    for (int v = 0; v < V; ++v) {
      row[v] = M::LoadX(reinterpret_cast<const typename M::X*>(b + k * b_stride + v * M::kLanes));
    }
    for (int r = 0; r < R; ++r) {
      const typename M::XVec value = M::SpreadUnit(a + r * a_stride + k);
      for (int v = 0; v < V; ++v) acc[r][v] = M::Add(acc[r][v], value, row[v]);
    }
  }
}

// What becomes of the sums in memory: c = a * b, c += a * b in one row of additions, or c = keep[row] * c + a * b.
enum class Into { kNew, kSum, kScaled };

template <class M, Into I, int R, int V>
inline void Panel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, const float* keep,
                  float* c, int64_t c_stride) {
  using F = DotF32;
  typename M::Acc acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      acc[r][v] = I == Into::kSum ? F::LoadX(c + r * c_stride + v * F::kLanes) : typename M::Acc{};
    }
  }
  Gather<M, R, V>(a, a_stride, b, b_stride, count, acc);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * F::kLanes;
      if (I == Into::kScaled) acc[r][v] = F::Add(acc[r][v], F::Spread(keep[r]), F::LoadX(to));
      F::Store(acc[r][v], to);
    }
  }
}

template <class M, Into I, int R>
inline void PanelOf(int64_t vecs, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                    const float* keep, float* c, int64_t c_stride) {
  if (vecs == 1) Panel<M, I, R, 1>(a, a_stride, b, b_stride, count, keep, c, c_stride);
  if constexpr (DotF32::kTileVecs > 1) {
    if (vecs == 2) Panel<M, I, R, 2>(a, a_stride, b, b_stride, count, keep, c, c_stride);
  }
  if constexpr (DotF32::kTileVecs > 2) {
    if (vecs == 3) Panel<M, I, R, 3>(a, a_stride, b, b_stride, count, keep, c, c_stride);
    if (vecs == 4) Panel<M, I, R, 4>(a, a_stride, b, b_stride, count, keep, c, c_stride);
  }
}

// By number of rows, from one on; of at most kTileRows rows and kTileVecs vectors.
template <class M, Into I>
constexpr void (*kPanels[])(int64_t, const float*, int64_t, const float*, int64_t, int64_t, const float*, float*,
                            int64_t) = {PanelOf<M, I, 1>, PanelOf<M, I, 2>, PanelOf<M, I, 3>,
                                        PanelOf<M, I, 4>, PanelOf<M, I, 5>, PanelOf<M, I, 6>};

inline int64_t VecsOf(int64_t width) { return (width + DotF32::kLanes - 1) / DotF32::kLanes; }

// c[0:rows, 0:width] = (c or 0) + a[0:rows, 0:count] * b[0:count, 0:width], rounded up to whole vectors in width.
template <class M, Into I>
void Multiply(const float* a, int64_t a_stride, int64_t num_rows, const float* b, int64_t b_stride, int64_t count,
              int64_t width, float* c, int64_t c_stride) {
  constexpr int64_t kLanes = DotF32::kLanes, kRows = DotF32::kTileRows;
  const int64_t vecs = VecsOf(width);
  for (int64_t v = 0; v < vecs;) {
    const int64_t panels = (vecs - v + DotF32::kTileVecs - 1) / DotF32::kTileVecs, here = (vecs - v + panels - 1) / panels;
    for (int64_t r = 0; r < num_rows;) {
      const int64_t tiles = (num_rows - r + kRows - 1) / kRows, rows = (num_rows - r + tiles - 1) / tiles;
      kPanels<M, I>[rows - 1](here, a + r * a_stride, a_stride, b + v * kLanes, b_stride, count, nullptr,
                              c + r * c_stride + v * kLanes, c_stride);
      r += rows;
    }
    v += here;
  }
}

// turned[0:width, 0:count] = x[0:count, 0:width], both rounded up to eight.
inline void Turn(const float* x, int64_t stride, int64_t count, int64_t width, float* turned, int64_t turned_stride) {
  for (int64_t k = 0; k < count; k += 8) {
    for (int64_t w = 0; w < width; w += 8) {
      TurnEight(x + k * stride + w, stride, turned + w * turned_stride + k, turned_stride);
    }
  }
}

// Where the key at a place of a request lies, a row of `row_bytes`; of a block that is none, or beyond the table or the
// cache, somewhere in the cache.
inline const char* KeyAt(const Keys& keys, const int32_t* table, int64_t num_blocks, int64_t place, int64_t row_bytes) {
  const int64_t block = place / keys.block_size, named = block < num_blocks && table[block] >= 0 ? table[block] : 0;
  const int64_t id = Least(named, keys.num_slots / keys.block_size - 1);
  return keys.data + (id * keys.block_size + place % keys.block_size) * row_bytes;
}

// `op` of all of x, which are whole sixteens, begun with `first`: sixteen of them side by side, then those in a tree. The
// compiler's own vectors, since it does not see them in a loop over arrays.
template <class Op>
inline float Folded(const float* x, int64_t count, float first, const Op& op) {
  Eight all[2] = {Eight{} + first, Eight{} + first}, part;
  for (int64_t i = 0; i < count; i += 16) {
    for (int half = 0; half < 2; ++half) {
      std::memcpy(&part, x + i + 8 * half, sizeof(part));
      all[half] = op(all[half], part);
    }
  }
  Eight a = op(all[0], all[1]);
  a = op(a, (Eight)CMJAX_MIX(a, a, 4, 5, 6, 7, 0, 1, 2, 3));
  a = op(a, (Eight)CMJAX_MIX(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
  a = op(a, (Eight)CMJAX_MIX(a, a, 1, 0, 3, 2, 5, 4, 7, 6));
  return a[0];
}

// Of the last sixteen values, those that count: from kCounts + 16 - count on.
constexpr uint32_t kAll = 0xffffffff;
constexpr uint32_t kCounts[32] = {kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll,
                                  kAll, kAll, kAll, kAll, kAll, kAll, kAll, kAll};

// A row of scores becomes weights relative to the largest so far, those behind the first `seen` zero up to `width`; what
// came before is to be multiplied by the result. There is memory for whole sixteens, and `scale` is positive.
inline float Weigh(float* score, int32_t seen, int32_t width, float scale, float* peak, float* total) {
  constexpr int kLanes = 16;
  const int32_t whole = (seen + kLanes - 1) / kLanes * kLanes;
  const auto fill_up = [=](float value) {
    if (seen == whole) return;
    float* last = score + whole - kLanes;
    const uint32_t* counts = kCounts + (whole - seen);
    for (int i = 0; i < kLanes; ++i) last[i] = FloatOf((BitsOf(last[i]) & counts[i]) | (BitsOf(value) & ~counts[i]));
  };
  fill_up(-__builtin_inff());
  const auto larger = [](const Eight& a, const Eight& b) { return a > b ? a : b; };
  const float found = scale * Folded(score, whole, -__builtin_inff(), larger);
  const float largest = found > *peak ? found : *peak;
  const float base = largest == -__builtin_inff() ? 0.0f : largest, keep = Exp(*peak - base);
  for (int32_t k = 0; k < whole; ++k) score[k] = Exp(score[k] * scale - base);
  fill_up(0.0f);
  for (int32_t k = whole; k < width; k += kLanes) std::memset(score + k, 0, kLanes * sizeof(float));
  *peak = largest;
  *total = *total * keep + Folded(score, whole, 0.0f, [](const Eight& a, const Eight& b) { return a + b; });
  return keep;
}
