// Un-absorbed attention of packed queries over a paged latent cache, of one form: part of form.cc.
//
// A head's keys and values are made of kExpandChunk latents at a time. Keys lie along the vectors, those of a chunk side
// by side, so that rows of the head's matrix make them as queries meet them; of values the width lies along the vectors.
// A value that a row does not see has no weight for it; one that is not finite can spoil rows before it all the same.
#pragma once

// Whole tiles, and whole units of queries.
static_assert(kExpandRows % DotF32::kTileRows == 0 && kExpandRows % 2 == 0);

inline int64_t Eights(int64_t width) { return (width + 7) / 8 * 8; }

// How many units `width` values of a row are, and those; zeros fill the last one.
template <class M>
inline int64_t UnitsOf(int64_t width) {
  constexpr int64_t kOfUnit = 4 / sizeof(typename M::X);
  return (width + kOfUnit - 1) / kOfUnit;
}

template <class M>
inline void PutRowUnits(const char* from, int64_t width, Type type, float* to) {
  if constexpr (sizeof(typename M::X) == 4) {
    ReadRow({from, 0, width, type, nullptr, 0}, 0, Type::kF32, to);
  } else {
    if (width > 0) to[UnitsOf<M>(width) - 1] = 0.0f;
    std::memcpy(to, from, width * sizeof(typename M::X));
  }
}

// Rows of two parts each as units: where they are, if that is how they lie there.
struct UnitRows {
  const float* data;
  int64_t stride;
};

template <class M>
inline UnitRows RowsAsUnits(const char* from, int64_t count, int64_t first_width, int64_t second_width, Type type,
                            float* memory) {
  const int64_t first = UnitsOf<M>(first_width), stride = first + UnitsOf<M>(second_width), item = ItemBytes(type);
  const int64_t width = first_width + second_width;
  if (stride * 4 == width * item && reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    return {reinterpret_cast<const float*>(from), stride};
  }
  for (int64_t r = 0; r < count; ++r, from += width * item) {
    PutRowUnits<M>(from, first_width, type, memory + r * stride);
    PutRowUnits<M>(from + first_width * item, second_width, type, memory + r * stride + first);
  }
  return {memory, stride};
}

// x[0:width], in whole vectors, rounded to `type`.
template <class M>
inline void RoundTo(Type type, int64_t width, float* x) {
  if (type != Type::kBF16) return;
  if constexpr (sizeof(typename M::X) == 2) {
    for (int64_t i = 0; i < width; i += M::kLanes) M::Round(x + i, x + i);
  } else {
    for (int64_t i = 0; i < width; ++i) x[i] = RoundBF16(x[i]);
  }
}

// to = rows [count, kExpandChunk] of floats, of which `width` columns matter, in whole vectors, rounded to `type` and as
// units of columns. Behind an odd last row there is one of zeros.
template <class M>
inline void PutColumnUnits(float* rows, int64_t count, int64_t width, Type type, float* to) {
  if constexpr (sizeof(typename M::X) == 2) {
    if (count % 2 == 1) std::memset(rows + count * kExpandChunk, 0, kExpandChunk * sizeof(float));
    for (int64_t r = 0; r < count; r += 2, rows += 2 * kExpandChunk, to += kExpandChunk) {
      for (int64_t i = 0; i < width; i += M::kLanes) M::PutPairs(rows + i, rows + kExpandChunk + i, to + i);
    }
  } else {
    std::memcpy(to, rows, count * kExpandChunk * sizeof(float));
    for (int64_t r = 0; r < count; ++r) RoundTo<M>(type, width, to + r * kExpandChunk);
  }
}

template <class D>
class Expanded {
  using M = typename D::Many;
  const Mla& mla_;
  const int64_t of_latent_, of_nope_, of_rope_, values_;  // units; and a row of values, padded
  float *matrix_, *turned_, *rows_, *latent_, *key_, *value_, *sums_, *query_, *mixed_;
  UnitRows w_;  // what makes keys; `turned_` makes values

 public:
  Expanded(const Mla& mla, int64_t head, char* scratch)
      : mla_(mla),
        of_latent_(UnitsOf<M>(mla.latent)),
        of_nope_(UnitsOf<M>(mla.nope)),
        of_rope_(UnitsOf<M>(mla.rope)),
        values_(Padded(mla.value)) {
    auto take = [at = reinterpret_cast<float*>(scratch)](int64_t count) mutable {
      float* taken = at;
      at += Padded(count);
      return taken;
    };
    matrix_ = take(mla.nope * of_latent_);
    turned_ = take(Eights(of_latent_) * values_);
    rows_ = take(kExpandChunk * (Eights(of_latent_) + Eights(of_rope_)));
    latent_ = take(Eights(of_latent_) * kExpandChunk);
    key_ = take((of_nope_ + Eights(of_rope_)) * kExpandChunk);
    value_ = take(kExpandChunk * values_);
    sums_ = take(kExpandRows * kExpandChunk);
    query_ = take(kExpandRows * (of_nope_ + of_rope_));
    mixed_ = take(kExpandRows * values_);
    const int64_t row_bytes = mla.latent * ItemBytes(mla.type);
    const char* from = mla.kv_b + head * (mla.nope + mla.value) * row_bytes;
    w_ = RowsAsUnits<M>(from, mla.nope, mla.latent, 0, mla.type, matrix_);
    for (int64_t v = 0; v < mla.value; v += 8) {
      for (int64_t r = 0; r < Least(8, mla.value - v); ++r) {
        PutRowUnits<M>(from + (mla.nope + v + r) * row_bytes, mla.latent, mla.type, rows_ + r * Eights(of_latent_));
      }
      Turn(rows_, Eights(of_latent_), 8, of_latent_, turned_ + v, values_);
    }
  }

  // The `count` keys from `begin` on become the head's keys and values.
  void Expand(const Keys& keys, const int32_t* table, int64_t max_blocks, int64_t begin, int64_t count) {
    const int64_t item = ItemBytes(mla_.type), width = mla_.latent + mla_.rope;
    const int64_t of_latent = Eights(of_latent_), stride = of_latent + Eights(of_rope_);
    const int64_t whole = VecsOf(count) * DotF32::kLanes;
    for (int64_t k = 0; k < count; ++k) {
      const char* from = KeyAt(keys, table, max_blocks, begin + k, width * item);
      PutRowUnits<M>(from, mla_.latent, mla_.type, rows_ + k * stride);
      PutRowUnits<M>(from + mla_.latent * item, mla_.rope, mla_.type, rows_ + k * stride + of_latent);
    }
    std::memset(rows_ + count * stride, 0, (whole - count) * stride * sizeof(float));
    Turn(rows_, stride, whole, of_latent_, latent_, kExpandChunk);
    Turn(rows_ + of_latent, stride, whole, of_rope_, key_ + of_nope_ * kExpandChunk, kExpandChunk);
    for (int64_t d = 0; d < mla_.nope; d += kExpandRows) {
      const int64_t here = Least(kExpandRows, mla_.nope - d);
      Multiply<M, Into::kNew>(w_.data + d * w_.stride, w_.stride, here, latent_, kExpandChunk, of_latent_, count, sums_,
                              kExpandChunk);
      PutColumnUnits<M>(sums_, here, whole, mla_.type, key_ + UnitsOf<M>(d) * kExpandChunk);
    }
    Multiply<M, Into::kNew>(rows_, stride, count, turned_, values_, of_latent_, mla_.value, value_, values_);
    RoundTo<M>(mla_.type, count * values_, value_);
  }

  // Rows of queries meet those keys, `num_keys` of them; row r sees the first seen + r.
  void Meet(const char* query, int64_t num_rows, int64_t seen, int64_t num_keys, const Softmax& state) {
    const int64_t item = ItemBytes(mla_.type), of_query = mla_.nope + mla_.rope, value = mla_.value;
    for (int64_t first = 0; first < num_rows; first += kExpandRows) {
      const int64_t here = Least(kExpandRows, num_rows - first);
      const UnitRows rows =
          RowsAsUnits<M>(query + first * of_query * item, here, mla_.nope, mla_.rope, mla_.type, query_);
      float* mixed = state.mixed + first * value;
      const Softmax block{state.peak + first, state.total + first, value % DotF32::kLanes == 0 ? mixed : mixed_};
      const int64_t stride = block.mixed == mixed ? value : values_;
      if (block.mixed != mixed) {
        for (int64_t r = 0; r < here; ++r) std::memcpy(mixed_ + r * stride, mixed + r * value, value * sizeof(float));
      }
      MeetBlock(rows, here, seen + first, num_keys, block, stride);
      if (block.mixed != mixed) {
        for (int64_t r = 0; r < here; ++r) std::memcpy(mixed + r * value, mixed_ + r * stride, value * sizeof(float));
      }
    }
  }

 private:
  // A tile of rows goes as far as its last row sees; what is beyond a row's own sight has no weight.
  void MeetBlock(const UnitRows& rows, int64_t num_rows, int64_t seen, int64_t num_keys, const Softmax& state,
                 int64_t mixed_stride) {
    constexpr int64_t kRows = DotF32::kTileRows, kVecs = DotF32::kTileVecs, kLanes = DotF32::kLanes;
    float keep[kExpandRows];
    const auto in_tile = [&](int64_t r) { return Least(kRows, num_rows - r); };
    const auto sight = [&](int64_t r) { return Least(num_keys, seen + r + in_tile(r) - 1); };  // of the tile from r on
    const int64_t most = VecsOf(Least(num_keys, seen + num_rows - 1));
    for (int64_t v = 0; v < most; v += kVecs) {
      for (int64_t r = 0; r < num_rows; r += kRows) {
        const int64_t vecs = Least(kVecs, VecsOf(sight(r)) - v);
        if (vecs <= 0) continue;
        kPanels<M, Into::kNew>[in_tile(r) - 1](vecs, rows.data + r * rows.stride, rows.stride, key_ + v * kLanes,
                                               kExpandChunk, of_nope_ + of_rope_, nullptr,
                                               sums_ + r * kExpandChunk + v * kLanes, kExpandChunk);
      }
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t own = Least(num_keys, seen + r), width = sight(r / kRows * kRows);
      keep[r] = Weigh(sums_ + r * kExpandChunk, static_cast<int32_t>(own), static_cast<int32_t>(width), mla_.scale,
                      state.peak + r, state.total + r);
    }
    for (int64_t v = 0; v < VecsOf(mla_.value); v += kVecs) {
      const int64_t vecs = Least(kVecs, VecsOf(mla_.value) - v);
      for (int64_t r = 0; r < num_rows; r += kRows) {
        kPanels<DotF32, Into::kScaled>[in_tile(r) - 1](vecs, sums_ + r * kExpandChunk, kExpandChunk, value_ + v * kLanes,
                                                       values_, sight(r), keep + r,
                                                       state.mixed + r * mixed_stride + v * kLanes, mixed_stride);
      }
    }
  }
};

template <class D>
void AttendExpandedOf(const Mla& mla, const Keys& keys, const Sequence& sequence, int64_t head, int64_t first,
                      int64_t end, const char* query, const Softmax& state, char* scratch) {
  const int64_t length = sequence.first_position + sequence.count;
  Expanded<D> expanded(mla, head, scratch);
  for (int64_t begin = first * kExpandChunk; begin < Least(end * kExpandChunk, length); begin += kExpandChunk) {
    const int64_t num_keys = Least(kExpandChunk, length - begin);
    expanded.Expand(keys, sequence.table, sequence.max_blocks, begin, num_keys);
    // Rows before the first of these keys do not see any.
    const int64_t row = begin > sequence.first_position ? begin - sequence.first_position : 0;
    expanded.Meet(query + row * (mla.nope + mla.rope) * ItemBytes(mla.type), sequence.count - row,
                  sequence.first_position + row + 1 - begin, num_keys,
                  {state.peak + row, state.total + row, state.mixed + row * mla.value});
  }
}

void AttendExpanded(const Mla& mla, const Keys& keys, const Sequence& sequence, int64_t head, int64_t first, int64_t end,
                    const char* query, const Softmax& state, char* scratch) {
  const auto attend = mla.type == Type::kF32 ? AttendExpandedOf<DotF32> : AttendExpandedOf<DotBF16>;
  attend(mla, keys, sequence, head, first, end, query, state, scratch);
}
