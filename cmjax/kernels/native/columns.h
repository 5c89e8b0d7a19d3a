// Products of many rows, of one form: part of form.cc.
//
// Columns of the matrix are laid side by side, and each vector of sums is for kLanes of them. Tile, for few rows, has
// vectors of kLanes parts of one sum, whose lane l takes every kLanes-th unit (32 bits) of a row from l on; Totals then
// adds the lanes. Here a lane's units come one after the other, lane by lane in the order in which Totals adds them: the
// results are the same, bit for bit. Sums of integers have no order, and one lane.
#pragma once

// How a row that is staged for D, `in` values, is made of units.
template <class D>
struct Units {
  static constexpr int64_t kOfStep = D::kStep * static_cast<int64_t>(sizeof(typename D::X)) / 4;
  static constexpr int64_t kVecsOfStep = kOfStep / D::kLanes;
  int64_t of_lane;
  explicit Units(int64_t in) : of_lane((in + D::kStep - 1) / D::kStep * kVecsOfStep) {}
};

// to = a staged row of `in` values, the units of a lane one after the other.
template <class D>
inline void PutByLane(const float* from, int64_t in, float* to) {
  const int64_t units = Units<D>(in).of_lane;
  int64_t vec = 0;
  for (; vec + 8 <= units; vec += 8) {
    for (int64_t lane = 0; lane < D::kLanes; lane += 8) {
      TurnEight(from + vec * D::kLanes + lane, D::kLanes, to + lane * units + vec, units);
    }
  }
  for (; vec < units; ++vec) {
    for (int64_t lane = 0; lane < D::kLanes; ++lane) to[lane * units + vec] = from[vec * D::kLanes + lane];
  }
}

// sums[0:kTileOfMany, 0:columns laid side by side] of rows by lane, `units` of each lane, which are `stride` apart.
template <class M>
inline void ManyTile(const float* x, int64_t stride, const float* columns, const int32_t* offsets, int64_t units,
                     typename M::Sum* sums, int64_t width) {
  constexpr int kVecs = M::kManyVecs, kRows = M::kTileOfMany;
  const int64_t count = units * M::kLanes / M::kParts;
  typename M::Acc acc[kRows][kVecs], waiting[M::kLevels][kRows][kVecs];
  for (int step = 0; step < M::kParts; ++step) {
    const float *w = columns + M::kOrder[step] * count * kVecs * M::kLanes, *row = x + M::kOrder[step] * count;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) acc[r][v] = M::Begin(offsets + v * M::kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      typename M::XVec wv[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        wv[v] = M::LoadX(reinterpret_cast<const typename M::X*>(w + (i * kVecs + v) * M::kLanes));
      }
      for (int r = 0; r < kRows; ++r) {
        const typename M::XVec xv = M::SpreadUnit(row + r * stride + i);
        for (int v = 0; v < kVecs; ++v) acc[r][v] = M::Add(acc[r][v], xv, wv[v]);
      }
    }
    // A sum of two waits for another two, and so on, as in a tree.
    int level = 0;
    for (; step >> level & 1; ++level) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVecs; ++v) acc[r][v] = M::Plus(waiting[level][r][v], acc[r][v]);
      }
    }
    if (step + 1 == M::kParts) break;
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) waiting[level][r][v] = acc[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) M::Store(acc[r][v], sums + r * width + v * M::kLanes);
  }
}

// Columns [first, first + count) of a matrix side by side, a row of them for each unit of a staged row.
template <class D>
class Columns {
  using M = typename D::Many;
  using W = typename D::W;
  using U = Units<D>;
  const int64_t units_;
  int32_t* const offsets_;  // what sums of integers begin with
  float* const data_;

 public:
  static constexpr int64_t kCols = M::kManyVecs * D::kLanes;
  static_assert(kCols <= kLaid);

  // `memory` is aligned, and has ColumnsScratch bytes. Where columns are fewer than kCols, the last one is there again.
  Columns(const Matrix& matrix, int64_t first, int64_t count, char* memory)
      : units_(U(matrix.in).of_lane),
        offsets_(reinterpret_cast<int32_t*>(memory)),
        data_(reinterpret_cast<float*>(memory + Padded(kLaid * 4))) {
    for (int64_t col = 0; col < kCols; col += 8) {
      const W* w[8];
      for (int64_t o = 0; o < 8; ++o) {
        w[o] = reinterpret_cast<const W*>(matrix.data) + (first + Least(col + o, count - 1)) * matrix.in;
        if constexpr (D::kHasOffset) {
          int32_t sum = 0;
          for (int64_t i = 0; i < matrix.in; ++i) sum += w[o][i];
          offsets_[col + o] = -128 * sum;
        }
      }
      Lay(w, matrix.in, col);
    }
  }

  // sums[0:num_rows, 0:kCols]; there are kTileOfMany or more. The last tile takes some rows again.
  void Sums(const Staged& rows, int64_t num_rows, typename D::Sum* sums, int64_t width) const {
    for (int64_t r = 0; r < num_rows; r += M::kTileOfMany) {
      const int64_t first = Least(r, num_rows - M::kTileOfMany);
      ManyTile<M>(reinterpret_cast<const float*>(rows.data + first * rows.stride), rows.stride / 4, data_, offsets_,
                   units_, sums + first * width, width);
    }
  }

 private:
  // Columns [col, col + 8), of `in` values each.
  void Lay(const W* const* w, int64_t in, int64_t col) {
    // From one lane to the next, and from one of its units to the next.
    const int64_t of_lane = M::kParts == 1 ? 1 : units_, of_vec = M::kParts == 1 ? D::kLanes : 1;
    constexpr int64_t kCount = sizeof(typename D::Unpacked) / 4;
    typename D::Unpacked unpacked[8];
    for (int64_t i = 0, vec = 0; i < in; i += D::kStep, vec += U::kVecsOfStep) {
      for (int64_t o = 0; o < 8; ++o) {
        W part[D::kStep] = {};
        if (i + D::kStep > in) std::memcpy(part, w[o] + i, (in - i) * sizeof(W));
        unpacked[o] = D::Unpack(i + D::kStep > in ? part : w[o] + i);
      }
      for (int64_t at = 0; at < kCount; at += 8) {
        Eight turned[8];
        TurnEight(reinterpret_cast<const float*>(unpacked) + at, kCount, turned);
        float* to = data_ + ((at % D::kLanes) * of_lane + (vec + at / D::kLanes) * of_vec) * kCols + col;
        for (int64_t lane = 0; lane < 8; ++lane) D::PutUnits(turned[lane], to + lane * of_lane * kCols, of_vec * kCols);
      }
    }
  }
};
