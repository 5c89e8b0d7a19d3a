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

// One request's queries meet blocks [first, end) of its keys, at most its own number of them.
void Attend(const Mla& mla, const Keys& keys, const int32_t* table, const int32_t* lengths, int64_t tokens,
            int64_t first, int64_t end, const char* query, const Softmax& state, char* scratch) {
  const int64_t item = ItemBytes(mla.type), heads = mla.heads, width = mla.latent + mla.rope, padded = Padded(width);
  const int64_t num_rows = tokens * heads, size = keys.block_size, stride = StagedStride(width);
  char* staged = scratch;
  auto* key = reinterpret_cast<float*>(staged + num_rows * stride);
  float *scores = key + size * padded, *floats = scores + num_rows * Padded(size);
  Stage({query, width * item, width, mla.type, nullptr, 0}, 0, num_rows, mla.type, mla.type, staged, nullptr, floats);
  for (int64_t block = first; block < end; ++block) {
    int64_t id = table[block] < 0 ? 0 : table[block];
    id = Least(id, keys.num_slots / size - 1);
    const char* at = keys.data + id * size * width * item;
    const Matrix matrix{at, nullptr, size, width, mla.type};
    const Staged rows{staged, stride, nullptr};
    if (mla.type == Type::kF32) {
      Sums<DotF32>(rows, num_rows, matrix, 0, size, scores, Padded(size));
    } else {
      Sums<DotBF16>(rows, num_rows, matrix, 0, size, scores, Padded(size));
    }
    for (int64_t k = 0; k < size; ++k) {
      ReadRow({at + k * width * item, 0, width, mla.type, nullptr, 0}, 0, Type::kF32, key + k * padded);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t seen = Least(lengths[r / heads] - block * size, size);
      if (seen <= 0) continue;
      float *score = scores + r * Padded(size), peak = state.peak[r];
      for (int64_t k = 0; k < seen; ++k) {
        score[k] *= mla.scale;
        peak = score[k] > peak ? score[k] : peak;
      }
      const float base = peak == -__builtin_inff() ? 0.0f : peak, keep = Exp(state.peak[r] - base);
      float total = 0.0f, *mixed = state.mixed + r * width;
      for (int64_t k = 0; k < seen; ++k) score[k] = Exp(score[k] - base);
      for (int64_t k = 0; k < seen; ++k) total += score[k];
      state.peak[r] = peak;
      state.total[r] = state.total[r] * keep + total;
      for (int64_t i = 0; i < width; ++i) mixed[i] *= keep;
      AddRows(score, key, seen, padded, width, mixed);
    }
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
    Stage(one, 0, 1, mla.type, mla.type, staged + t * stride, nullptr, floats);
  }
  const char* from = mla.kv_b + (head * (mla.nope + mla.value) + mla.nope) * mla.latent * item;
  const Matrix matrix{from, nullptr, mla.value, mla.latent, mla.type};
  const Target target{out + head * mla.value * item, mla.heads * mla.value, mla.type};
  Product({staged, stride, nullptr}, tokens, matrix, 0, mla.value, target, staged + tokens * stride);
}
