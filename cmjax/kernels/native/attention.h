// Absorbed attention over a paged latent cache, of one form: part of form.cc.
#pragma once

// y[0:width] += a * x[0:width]
inline void AddScaled(float a, const float* x, int64_t width, float* y) {
  for (int64_t i = 0; i < width; ++i) y[i] = MulAdd(a, x[i], y[i]);
}

inline void AddScaled4(const float* a, const float* x, int64_t stride, int64_t width, float* y) {
  const float *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
  for (int64_t i = 0; i < width; ++i) {
    y[i] = MulAdd(a[3], x3[i], MulAdd(a[2], x2[i], MulAdd(a[1], x1[i], MulAdd(a[0], x[i], y[i]))));
  }
}

// y[0:width] += sum_k a[k] * x[k, 0:width]
inline void AddRows(const float* a, const float* x, int64_t count, int64_t stride, int64_t width, float* y) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) AddScaled4(a + k, x + k * stride, stride, width, y);
  for (; k < count; ++k) AddScaled(a[k], x + k * stride, width, y);
}

inline void WriteRow(const float* from, int64_t width, Type type, char* to) {
  if (type == Type::kF32) {
    std::memcpy(to, from, width * sizeof(float));
  } else {
    auto* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < width; ++i) out[i] = Narrow(from[i]);
  }
}

// The queries of one head: q_nope through the key part of its matrix, q_pe behind them.
void Absorb(const Mla& mla, const char* q_nope, const char* q_pe, int64_t tokens, int64_t head, char* query,
            float* scratch) {
  const int64_t item = ItemBytes(mla.type), heads = mla.heads, padded = Padded(mla.latent);
  float *w = scratch, *q = w + mla.nope * padded, *sum = q + Padded(mla.nope);
  const char* from = mla.kv_b + head * (mla.nope + mla.value) * mla.latent * item;
  const Rows rows{from, mla.latent * item, mla.latent, mla.type, nullptr, 0};
  for (int64_t n = 0; n < mla.nope; ++n) ReadRow(rows, n, Type::kF32, w + n * padded);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t place = t * heads + head;
    ReadRow({q_nope + place * mla.nope * item, 0, mla.nope, mla.type, nullptr, 0}, 0, Type::kF32, q);
    for (int64_t i = 0; i < mla.latent; ++i) sum[i] = 0.0f;
    AddRows(q, w, mla.nope, padded, mla.latent, sum);
    char* to = query + place * (mla.latent + mla.rope) * item;
    WriteRow(sum, mla.latent, mla.type, to);
    std::memcpy(to + mla.latent * item, q_pe + place * mla.rope * item, mla.rope * item);
  }
}

// One request's queries meet blocks [first, end) of its keys, at most its own number of them, a chunk at a time.
void Attend(const Mla& mla, const Keys& keys, const int32_t* table, const int32_t* lengths, int64_t tokens,
            int64_t first, int64_t end, const char* query, const Softmax& state, char* scratch) {
  const int64_t item = ItemBytes(mla.type), heads = mla.heads, width = mla.latent + mla.rope, padded = Padded(width);
  const int64_t num_rows = tokens * heads, size = keys.block_size, unit = ChunkBlocks(size) * size;
  auto* q = reinterpret_cast<float*>(scratch);
  float *key = q + num_rows * padded, *turned = key + kChunk * padded, *scores = turned + padded * kChunk;
  float* mixed = scores + num_rows * kChunk;
  int64_t longest = 0;
  for (int64_t t = 0; t < tokens; ++t) longest = lengths[t] > longest ? lengths[t] : longest;
  for (int64_t r = 0; r < num_rows; ++r) {
    ReadRow({query + r * width * item, 0, width, mla.type, nullptr, 0}, 0, Type::kF32, q + r * padded);
    std::memcpy(mixed + r * padded, state.mixed + r * width, width * sizeof(float));
  }
  std::memset(key, 0, kChunk * padded * sizeof(float));  // what lies behind a row and behind the last one is turned, too
  const int64_t stop = Least(end * size, longest);
  for (int64_t begin = first * size, count = 0; begin < stop; begin += count) {
    // Units are whole blocks, which parts consist of: the chunks are the same in one part as in several.
    count = Least(kChunk, Least(stop, (begin / unit + 1) * unit) - begin);
    for (int64_t k = 0; k < count; ++k) {
      ReadRow({KeyAt(keys, table, end, begin + k, width * item), 0, width, mla.type, nullptr, 0}, 0, Type::kF32,
              key + k * padded);
    }
    Turn(key, padded, (count + DotF32::kLanes - 1) / DotF32::kLanes * DotF32::kLanes, width, turned, kChunk);
    Multiply<DotF32, Into::kNew>(q, padded, num_rows, turned, kChunk, width, count, scores, kChunk);
    const auto seen = [&](int64_t token) {
      const int64_t rest = Least(lengths[token] - begin, count);
      return static_cast<int32_t>(rest < 0 ? 0 : rest);
    };
    for (int64_t r = 0; r < num_rows; ++r) {
      const float keep = Weigh(scores + r * kChunk, seen(r / heads), kChunk, mla.scale, state.peak + r, state.total + r);
      for (int64_t i = 0; i < width; ++i) mixed[r * padded + i] *= keep;
    }
    // The keys that a token does not see are not its business, even where they are no numbers: tokens of one length at
    // a time.
    for (int64_t t = 0, same = 1; t < tokens; t += same, same = 1) {
      while (t + same < tokens && seen(t + same) == seen(t)) ++same;
      Multiply<DotF32, Into::kSum>(scores + t * heads * kChunk, kChunk, same * heads, key, padded, seen(t), width,
                                   mixed + t * heads * padded, padded);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    std::memcpy(state.mixed + r * width, mixed + r * padded, width * sizeof(float));
  }
}

// The weighted means of one head, through the value part of its matrix.
void Release(const Mla& mla, const Softmax& state, int64_t tokens, int64_t head, char* out, char* scratch) {
  const int64_t width = mla.latent + mla.rope, stride = StagedStride(mla.latent), item = ItemBytes(mla.type);
  auto* mean = reinterpret_cast<float*>(scratch);
  float* floats = mean + Padded(mla.latent);
  char* staged = reinterpret_cast<char*>(floats + Padded(mla.latent));
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t row = t * mla.heads + head;
    const float total = state.total[row] > 0.0f ? state.total[row] : 1.0f;
    for (int64_t i = 0; i < mla.latent; ++i) mean[i] = state.mixed[row * width + i] / total;
    const Rows one{scratch, mla.latent * 4, mla.latent, Type::kF32, nullptr, 0};
    Stage(one, 0, 1, mla.type, mla.type, {staged + t * stride, stride, nullptr, false}, floats);
  }
  const char* from = mla.kv_b + (head * (mla.nope + mla.value) + mla.nope) * mla.latent * item;
  const Matrix matrix{from, nullptr, mla.value, mla.latent, mla.type};
  const Target target{out + head * mla.value * item, mla.heads * mla.value, mla.type};
  Product({staged, stride, nullptr, false}, tokens, matrix, 0, mla.value, target, staged + tokens * stride);
}
