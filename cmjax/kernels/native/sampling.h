// A request's next token, of one form: part of form.cc.
#pragma once

constexpr int64_t kTokens = 64;  // looked at together

inline float Infinity() { return __builtin_inff(); }

// The largest value, which is NaN where there is one.
inline float PeakOf(const float* x, int64_t count) {
  constexpr int64_t kLanes = 16;
  const int64_t whole = count / kLanes * kLanes;
  float lanes[kLanes], most = -Infinity();
  int32_t bad[kLanes] = {}, is_bad = 0;
  for (float& lane : lanes) lane = most;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = x[i + lane];
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];
      bad[lane] |= value != value;
    }
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    most = lanes[lane] > most ? lanes[lane] : most;
    is_bad |= bad[lane];
  }
  for (int64_t i = whole; i < count; ++i) {
    most = x[i] > most ? x[i] : most;
    is_bad |= x[i] != x[i];
  }
  return is_bad ? __builtin_nanf("") : most;
}

// The first place that holds a value which is there.
inline int32_t PlaceOf(const float* x, int64_t count, float value) {
  int64_t at = 0;
  for (; at + kTokens <= count; at += kTokens) {
    int32_t is_here = 0;
    for (int64_t i = 0; i < kTokens; ++i) is_here |= x[at + i] == value;
    if (is_here) break;
  }
  while (at < count && x[at] != value) ++at;
  return static_cast<int32_t>(at);
}

// A request's settings, in the order of cmjax's SamplingState, and the row's tokens.
struct Choice {
  Choice(const Sampler& all, int64_t row) : all(all) {
    const int64_t request = row / all.width;
    words = all.words + request * all.num_words;
    const int32_t* at = words + kSettings;
    const auto take = [&at](int64_t count) {
      const int32_t* taken = at;
      at += count;
      return taken;
    };
    bias_ids = take(all.num_bias);
    bias_values = take(all.num_bias);
    stop_ids = take(all.num_stop);
    word_ids = take(all.num_word_tokens);
    word_ends = take(all.num_word_tokens);
    prompt_mask = reinterpret_cast<const uint8_t*>(take((all.num_mask_bytes + 3) / 4));
    allowed_mask = reinterpret_cast<const uint8_t*>(take((all.num_mask_bytes + 3) / 4));
    history = all.history + request * all.longest;
    drafts = all.drafts + request * all.num_drafts;
    while (num_own < all.longest && history[num_own] >= 0) ++num_own;
    num_generated = all.longest == 0 ? 0 : Least(num_own + all.first + row % all.width, all.longest);
  }

  float Float(int64_t word) const { return FloatOf(static_cast<uint32_t>(words[word])); }
  float temperature() const { return Float(0); }
  int32_t top_k() const { return words[1]; }
  float top_p() const { return Float(2); }
  float min_p() const { return Float(3); }
  float presence() const { return Float(4); }
  float frequency() const { return Float(5); }
  float repetition() const { return Float(6); }
  int32_t min_positions() const { return words[7]; }

  int32_t Generated(int64_t index) const { return index < num_own ? history[index] : drafts[index - num_own]; }

  const Sampler& all;
  const int32_t *words, *bias_ids, *bias_values, *stop_ids, *word_ids, *word_ends, *history, *drafts;
  const uint8_t *prompt_mask, *allowed_mask;
  int64_t num_own = 0, num_generated = 0;
};

// Whether a row may ask for more than temperature and filters.
inline bool HasSettings(const Choice& row, int32_t position) {
  int32_t all_bits = 0xff;
  for (int64_t i = 0; i < row.all.num_mask_bytes; ++i) all_bits &= row.allowed_mask[i];
  return all_bits != 0xff || (row.all.num_word_tokens > 0 && row.word_ends[0] >= 0) || position < row.min_positions() ||
         (row.all.num_bias > 0 && row.bias_ids[0] >= 0) || row.presence() != 0.0f || row.frequency() != 0.0f ||
         row.repetition() != 1.0f;
}

inline bool HasBit(const uint8_t* mask, int64_t token) { return mask[token / 8] >> (token % 8) & 1; }

// The logits with all that a request asks for but temperature and filters.
inline void Adjust(const Choice& row, int32_t position, float* x, int32_t* counts) {
  const int64_t vocabulary = row.all.vocabulary;
  const auto add = [x, vocabulary](int32_t token, float value) {
    if (token >= 0 && token < vocabulary) x[token] += value;
  };
  if (row.all.num_mask_bytes > 0) {
    for (int64_t i = 0; i < vocabulary; ++i) x[i] = HasBit(row.allowed_mask, i) ? x[i] : -Infinity();
  }
  // Words lie one behind another; a word's last token is forbidden where the others have just been generated.
  for (int64_t first = 0; first < row.all.num_word_tokens && row.word_ends[first] >= 0;) {
    const int64_t before = Least(row.word_ends[first], row.all.num_word_tokens - 1 - first);
    bool follows = before <= row.num_generated;
    for (int64_t i = 0; i < before && follows; ++i) {
      follows = row.Generated(row.num_generated - before + i) == row.word_ids[first + i];
    }
    if (follows) add(row.word_ids[first + before], -Infinity());
    first += before + 1;
  }
  if (position < row.min_positions()) {
    for (int64_t i = 0; i < row.all.num_stop; ++i) add(row.stop_ids[i], -Infinity());
  }
  for (int64_t i = 0; i < row.all.num_bias; ++i) add(row.bias_ids[i], FloatOf(static_cast<uint32_t>(row.bias_values[i])));

  const bool has_prompt = row.all.num_mask_bytes > 0;
  const float presence = row.presence(), frequency = row.frequency(), repetition = row.repetition();
  if (!has_prompt && row.all.longest == 0) return;
  if (presence == 0.0f && frequency == 0.0f && repetition == 1.0f) return;
  std::memset(counts, 0, vocabulary * sizeof(int32_t));
  for (int64_t i = 0; i < row.num_generated; ++i) {
    const int32_t token = row.Generated(i);
    if (token >= 0 && token < vocabulary) ++counts[token];
  }
  if (has_prompt) {
    for (int64_t i = 0; i < vocabulary; ++i) {
      if (counts[i] > 0 || HasBit(row.prompt_mask, i)) x[i] = x[i] > 0.0f ? x[i] / repetition : x[i] * repetition;
    }
  }
  for (int64_t i = 0; i < vocabulary; ++i) {
    x[i] = x[i] - frequency * static_cast<float>(counts[i]) - (counts[i] > 0 ? presence : 0.0f);
  }
}

inline Eight LoadEight(const float* from) {
  Eight values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

// The sum of the weights above `limit`; `padded` ends in values that are above nothing. In vectors: GCC 12 loses some of a
// plain loop's sums for AVX2.
inline float Above(const float* x, const float* weights, int64_t padded, float limit) {
  Eight sums[2] = {};
  for (int64_t i = 0; i < padded; i += 16) {
    for (int64_t half = 0; half < 2; ++half) {
      const Order is_above = LoadEight(x + i + 8 * half) > Eight{} + limit;
      sums[half] += (Eight)((Order)LoadEight(weights + i + 8 * half) & is_above);
    }
  }
  const Eight both = sums[0] + sums[1];
  float sum = 0.0f;
  for (int lane = 0; lane < 8; ++lane) sum += both[lane];
  return sum;
}

// Leaves out what has `most` of the weights above it or more, but never the best.
inline void KeepWithin(float* x, const float* weights, int64_t padded, float best, float most) {
  // The largest value with so much above it, bit by bit of an integer in the order of floats; 0: there is not so much.
  uint32_t key = 0;
  const auto value = [](uint32_t key) { return ValueOf(static_cast<int32_t>(key ^ 0x80000000u)); };
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (Above(x, weights, padded, value(key | bit)) >= most) key |= bit;
  }
  if (key == 0) return;
  const float limit = value(key);
  for (int64_t i = 0; i < padded; ++i) x[i] = x[i] > limit || x[i] == best ? x[i] : -Infinity();
}

// Leaves out what min-p, top-k and top-p do, of logits over temperature.
inline void Filter(const Choice& row, float best, float* x, float* weights, int64_t padded) {
  if (best == Infinity()) return;  // only a penalty or a temperature near zero makes it so
  if (row.min_p() > 0.0f) {
    const float least = best + Log(row.min_p());
    for (int64_t i = 0; i < padded; ++i) x[i] = x[i] >= least ? x[i] : -Infinity();
  }
  if (row.top_k() > 0 && row.top_k() < row.all.vocabulary) {
    for (int64_t i = 0; i < padded; ++i) weights[i] = 1.0f;
    KeepWithin(x, weights, padded, best, static_cast<float>(row.top_k()));
  }
  if (row.top_p() < 1.0f) {
    for (int64_t i = 0; i < padded; ++i) weights[i] = x[i] == -Infinity() ? 0.0f : Exp(x[i] - best);
    const float total = Above(x, weights, padded, -Infinity());
    for (int64_t i = 0; i < padded; ++i) weights[i] /= total;
    KeepWithin(x, weights, padded, best, row.top_p());
  }
}

inline void Mix(uint32_t& a, uint32_t& b, int bits) {
  a += b;
  b = (b << bits | b >> (32 - bits)) ^ a;
}

// Threefry 2x32 in twenty rounds (Salmon and others, 2011), by which jax.random makes its numbers.
struct Threefry {
  Threefry(uint32_t first, uint32_t second) : keys{first, second, first ^ second ^ 0x1bd11bda} {}

  void Turn(uint32_t& a, uint32_t& b) const {
    a += keys[0], b += keys[1];
    Mix(a, b, 13), Mix(a, b, 15), Mix(a, b, 26), Mix(a, b, 6);
    a += keys[1], b += keys[2] + 1;
    Mix(a, b, 17), Mix(a, b, 29), Mix(a, b, 16), Mix(a, b, 24);
    a += keys[2], b += keys[0] + 2;
    Mix(a, b, 13), Mix(a, b, 15), Mix(a, b, 26), Mix(a, b, 6);
    a += keys[0], b += keys[1] + 3;
    Mix(a, b, 17), Mix(a, b, 29), Mix(a, b, 16), Mix(a, b, 24);
    a += keys[1], b += keys[2] + 4;
    Mix(a, b, 13), Mix(a, b, 15), Mix(a, b, 26), Mix(a, b, 6);
    a += keys[2], b += keys[0] + 5;
  }

  uint32_t keys[3];
};

// The token with the best of `x` plus Gumbel noise of nothing but seed and position: that of jax.random.gumbel, with the
// key of the seed and the position folded in.
inline int32_t Draw(const Choice& row, int32_t position, const float* x, int64_t padded) {
  uint32_t a = 0, b = static_cast<uint32_t>(position);
  Threefry(row.words[9], row.words[10]).Turn(a, b);
  const Threefry numbers(a, b);
  float best = -Infinity();
  int32_t token = 0;
  for (int64_t first = 0; first < padded; first += kTokens) {
    if (PeakOf(x + first, kTokens) == -Infinity()) continue;
    float noisy[kTokens];
    for (int64_t i = 0; i < kTokens; ++i) {
      uint32_t high = 0, low = static_cast<uint32_t>(first + i);
      numbers.Turn(high, low);
      const float uniform = FloatOf((high ^ low) >> 9 | 0x3f800000u) - 1.0f;
      noisy[i] = x[first + i] - Log(-Log(uniform + 1.17549435e-38f));
    }
    const float here = PeakOf(noisy, kTokens);
    if (here > best) {
      best = here;
      token = static_cast<int32_t>(first) + PlaceOf(noisy, kTokens, here);
    }
  }
  return token;
}

int32_t Sample(const Sampler& all, int64_t index, char* scratch) {
  const float* logits = all.logits + index * all.vocabulary;
  float peak = PeakOf(logits, all.vocabulary);
  if (!(peak - peak == 0.0f)) return all.not_finite;
  if (all.num_words == 0) return PlaceOf(logits, all.vocabulary, peak);
  const int64_t padded = Padded(all.vocabulary);
  auto *x = reinterpret_cast<float*>(scratch), *weights = x + padded;
  const Choice row(all, index);
  const int32_t position = all.positions[index];
  if (HasSettings(row, position)) {
    std::memcpy(x, logits, all.vocabulary * sizeof(float));
    Adjust(row, position, x, reinterpret_cast<int32_t*>(weights));
    peak = PeakOf(x, all.vocabulary);
    if (peak == -Infinity()) return all.nothing_allowed;
    logits = x;
  }
  if (!(row.temperature() > 0.0f)) return PlaceOf(logits, all.vocabulary, peak);
  for (int64_t i = 0; i < all.vocabulary; ++i) x[i] = logits[i] / row.temperature();
  for (int64_t i = all.vocabulary; i < padded; ++i) x[i] = -Infinity();
  Filter(row, peak / row.temperature(), x, weights, padded);
  return Draw(row, position, x, padded);
}
