// The kernels without XLA, at the bounds of their buffers, for the sanitizers: every buffer is an allocation of its own
// and begins off its alignment. Each form that this CPU runs is compared with sums in double.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

using namespace cmjax;

namespace {

std::mt19937 random_bits(7);

float Draw() { return static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) / 1000.0f; }

// Values of a type behind one that leaves them misaligned, and what they are.
struct Array {
  Type type;
  std::vector<char> memory;
  std::vector<float> values;

  Array(Type type, int64_t count) : type(type), memory(count * ItemBytes(type) + ItemBytes(type)), values(count) {
    for (int64_t i = 0; i < count; ++i) {
      if (type == Type::kS8) {
        const int value = static_cast<int>(random_bits() % 255) - 127;
        data()[i] = static_cast<char>(value);
        values[i] = static_cast<float>(value);
        continue;
      }
      uint32_t bits;
      values[i] = Draw();
      std::memcpy(&bits, &values[i], 4);
      if (type == Type::kBF16) bits &= 0xffff0000;
      std::memcpy(&values[i], &bits, 4);
      const char* from = reinterpret_cast<const char*>(&bits) + (type == Type::kBF16 ? 2 : 0);
      std::memcpy(data() + i * ItemBytes(type), from, ItemBytes(type));
    }
  }

  char* data() { return memory.data() + ItemBytes(type); }
};

// A helper is a thread of its own.
const Helpers kThreads{2, [](std::function<void()> run) { std::thread(std::move(run)).detach(); }};

void Check(bool ok, const char* what, int64_t rows, int64_t out, int64_t in) {
  if (ok) return;
  std::printf("%s, form %s: %d rows, %d by %d\n", what, CurrentForm().name, int(rows), int(out), int(in));
  std::exit(1);
}

void TestProduct(Type type, int64_t rows, int64_t out, int64_t in) {
  Array x(type == Type::kS8 ? Type::kF32 : type, rows * in), w(type, out * in);
  std::vector<float> scale(out, 0.5f), y(rows * out, NAN), alone(out);
  const Rows of_x{x.data(), in * ItemBytes(x.type), in, x.type, nullptr, 0};
  const Matrix matrix{w.data(), type == Type::kS8 ? scale.data() : nullptr, out, in, type};
  const auto at = [](std::vector<float>& v) { return Target{reinterpret_cast<char*>(v.data()), 0, Type::kF32}; };
  Target target = at(y), one = at(alone);
  target.width = one.width = out;
  const Type dtype = type == Type::kBF16 ? Type::kBF16 : Type::kF32;
  RunProduct(of_x, rows, matrix, dtype, target, kThreads);
  for (int64_t r = 0; r < rows; ++r) {
    double largest = 0;
    for (int64_t i = 0; i < in; ++i) largest = std::fmax(largest, std::fabs(x.values[r * in + i]));
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += double(x.values[r * in + i]) * w.values[o * in + i];
      const double wanted = type == Type::kS8 ? sum * 0.5 : sum;
      const double slack = type == Type::kS8 ? 127 * 0.5 * in * largest / 127 : 1e-5 * (1 + std::sqrt(double(in)));
      Check(std::fabs(y[r * out + o] - wanted) <= slack, "product", rows, out, in);
    }
    // The rows beside it make no difference.
    const Rows row{x.data() + r * of_x.stride, of_x.stride, in, x.type, nullptr, 0};
    RunProduct(row, 1, matrix, dtype, one, kThreads);
    Check(std::memcmp(alone.data(), &y[r * out], out * 4) == 0, "one row of a product", rows, out, in);
  }
}

void TestExperts(Type type, std::vector<int32_t> counts, int64_t hidden, int64_t ffn) {
  const int64_t experts = static_cast<int64_t>(counts.size());
  int64_t rows = 0;
  for (int32_t count : counts) rows += count;
  const Type dtype = type == Type::kS8 ? Type::kF32 : type;
  Array x(dtype, rows * hidden), w13(type, experts * 2 * ffn * hidden), w2(type, experts * hidden * ffn);
  std::vector<float> scale(experts * (2 * ffn + hidden), 0.01f);
  const float* scales = type == Type::kS8 ? scale.data() : nullptr;
  std::vector<char> y(rows * hidden * ItemBytes(dtype));
  const Experts both{{w13.data(), scales, 2 * ffn, hidden, type}, {w2.data(), scales, hidden, ffn, type}, experts};
  RunExperts({x.data(), hidden * ItemBytes(dtype), hidden, dtype, nullptr, 0}, counts.data(), both,
             {y.data(), hidden, dtype}, kThreads);
  if (type != Type::kF32) return;
  int64_t r = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int32_t i = 0; i < counts[e]; ++i, ++r) {
      std::vector<double> middle(ffn);
      for (int64_t f = 0; f < ffn; ++f) {
        double gate = 0, up = 0;
        for (int64_t h = 0; h < hidden; ++h) {
          gate += double(x.values[r * hidden + h]) * w13.values[((e * 2 * ffn) + f) * hidden + h];
          up += double(x.values[r * hidden + h]) * w13.values[((e * 2 * ffn) + ffn + f) * hidden + h];
        }
        middle[f] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t h = 0; h < hidden; ++h) {
        double sum = 0, size = 0;
        for (int64_t f = 0; f < ffn; ++f) {
          sum += middle[f] * w2.values[(e * hidden + h) * ffn + f];
          size += std::fabs(middle[f]);
        }
        float value;
        std::memcpy(&value, y.data() + (r * hidden + h) * 4, 4);
        Check(std::fabs(value - sum) <= 1e-5 * (1 + size), "experts", rows, ffn, hidden);
      }
    }
  }
}

// An expert's rows are the same alone as among others, however many they are and in whatever parts they are taken.
void TestExpertRows(Type type, Type w2_type, const Helpers& helpers) {
  const int64_t hidden = 130, ffn = 33, most = 330;
  const Type dtype = type == Type::kS8 ? Type::kBF16 : type;
  const auto scales = [](Type type, const std::vector<float>& all) { return type == Type::kS8 ? all.data() : nullptr; };
  const std::vector<float> scale(2 * ffn + hidden, 0.01f);
  Array x(dtype, most * hidden), w13(type, 2 * ffn * hidden), w2(w2_type, hidden * ffn);
  const Experts one{{w13.data(), scales(type, scale), 2 * ffn, hidden, type},
                    {w2.data(), scales(w2_type, scale), hidden, ffn, w2_type}, 1};
  const int64_t stride = hidden * ItemBytes(dtype);
  const auto run = [&](int64_t first, int32_t count, std::vector<char>& y) {
    RunExperts({x.data() + first * stride, stride, hidden, dtype, nullptr, 0}, &count, one, {y.data(), hidden, dtype},
               helpers);
  };
  std::vector<char> each(most * stride), alone(stride);
  for (int64_t r = 0; r < most; ++r) {
    run(r, 1, alone);
    std::memcpy(each.data() + r * stride, alone.data(), stride);
  }
  for (int32_t count : {2, 12, 23, 24, 25, 48, 49, 79, 80, 84, 97, 144, 145, 160, 289, 330}) {
    std::vector<char> y(count * stride);
    run(0, count, y);
    Check(std::memcmp(y.data(), each.data(), y.size()) == 0, "rows of an expert", count, ffn, hidden);
  }
}

// Two tokens of a request, of which the second sees one key more, which is no number: the first is what it is alone.
void TestUnseen(const Mla& mla, Array& cache, int64_t block_size, int32_t length) {
  const int64_t width = mla.latent + mla.rope, rows = 2 * mla.heads;
  if (mla.type != Type::kF32 || length == 0 || length >= 6 * block_size) return;
  Array query(Type::kF32, rows * width);
  const std::vector<int32_t> table{0, 1, 2, 3, 4, 5}, lengths{length, length + 1};
  const float none = NAN;
  std::memcpy(cache.data() + length * width * 4, &none, 4);
  std::vector<float> peak(rows, -INFINITY), total(rows), mixed(rows * width), alone(rows / 2 * width);
  std::vector<float> peak_alone(rows / 2, -INFINITY), total_alone(rows / 2);
  const Keys keys{cache.data(), 6 * block_size, block_size};
  RunAttend(mla, keys, {table.data(), lengths.data(), 1, 6, 2}, 0, 1, query.data(),
            {peak.data(), total.data(), mixed.data()}, kThreads);
  RunAttend(mla, keys, {table.data(), lengths.data(), 1, 6, 1}, 0, 1, query.data(),
            {peak_alone.data(), total_alone.data(), alone.data()}, kThreads);
  Check(std::memcmp(mixed.data(), alone.data(), alone.size() * 4) == 0, "unseen key", 2, block_size, length);
}

void TestAttention(Type type, int64_t tokens, int64_t block_size, int32_t length) {
  const int64_t heads = 3, nope = 5, rope = 2, value = 7, latent = 13, width = latent + rope, blocks = 6;
  Array q_nope(type, tokens * heads * nope), q_pe(type, tokens * heads * rope);
  Array kv_b(type, heads * (nope + value) * latent), cache(type, blocks * block_size * width);
  std::vector<char> query(tokens * heads * width * ItemBytes(type)), out(tokens * heads * value * ItemBytes(type));
  std::vector<float> peak(tokens * heads, -INFINITY), total(tokens * heads), mixed(tokens * heads * width);
  const Mla mla{kv_b.data(), heads, nope, rope, value, latent, 0.3f, type};
  const Softmax state{peak.data(), total.data(), mixed.data()};
  // Ids that are none, and one beyond the cache, must not be followed; one request has nothing to see.
  const std::vector<int32_t> table{5, 2, 0, -1, 99, 1};
  std::vector<int32_t> lengths(tokens, length);
  lengths[0] = 0;
  RunAbsorb(mla, q_nope.data(), q_pe.data(), tokens, query.data(), kThreads);
  std::vector<int32_t> tables;
  for (int64_t t = 0; t < tokens; ++t) tables.insert(tables.end(), table.begin(), table.end());
  for (int64_t part = 0; part < 2; ++part) {
    RunAttend(mla, {cache.data(), blocks * block_size, block_size}, {tables.data(), lengths.data(), tokens, 6, tokens},
              part, 2, query.data(), state, kThreads);
  }
  RunRelease(mla, state, tokens, out.data(), kThreads);
  TestUnseen(mla, cache, block_size, length);
  for (int64_t r = heads; r < tokens * heads; ++r) {
    const double sum = total[r];
    Check(length == 0 || (sum >= 0.99 && sum <= length * 1.01), "attention", tokens, block_size, length);
  }
}

// Two sequences and an empty one between them, over blocks of which some are none or beyond the cache, against sums in
// double; and the last rows of the first one alone, in whatever memory.
void TestExpanded(Type type, int64_t count, int64_t cached, int64_t block_size, int64_t value) {
  const int64_t heads = 2, nope = 5, rope = 3, latent = 13, width = latent + rope, of_query = nope + rope, item = ItemBytes(type);
  const int64_t blocks = (count + cached + block_size - 1) / block_size, rows = count + 2, slots = 4 * block_size;
  Array query(type, heads * rows * of_query), kv_b(type, heads * (nope + value) * latent), cache(type, slots * width);
  std::vector<int32_t> table(3 * blocks), starts{0, -5, int32_t(count)}, counts{int32_t(count), 0, 2};
  std::vector<int32_t> firsts{int32_t(cached), 7, 0};
  for (int32_t& id : table) id = static_cast<int32_t>(random_bits() % 6) - 1;
  if (blocks * block_size < 2) counts[2] = 0;
  const Mla mla{kv_b.data(), heads, nope, rope, value, latent, 0.3f, type};
  const Keys keys{cache.data(), slots, block_size};
  std::vector<float> peak(heads * rows, -INFINITY), total(heads * rows), mixed(heads * rows * value);
  for (int64_t part = 0; part < 2; ++part) {
    RunAttendExpanded(mla, keys, {table.data(), starts.data(), counts.data(), firsts.data(), 3, blocks}, rows, part, 2,
                      query.data(), {peak.data(), total.data(), mixed.data()}, kThreads);
  }
  const auto rounded = [type](double x) {
    if (type == Type::kF32) return x;
    int exponent;
    const double part = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(part * 256), exponent - 8);
  };
  const auto latent_of = [&](int64_t s, int64_t key, int64_t i) {
    const int64_t id = std::min<int64_t>(std::max(table[s * blocks + key / block_size], 0), 3);
    return double(cache.values[(id * block_size + key % block_size) * width + i]);
  };
  const auto through = [&](int64_t s, int64_t head, int64_t key, int64_t out) {
    double sum = 0;
    for (int64_t i = 0; i < latent; ++i) {
      sum += latent_of(s, key, i) * kv_b.values[(head * (nope + value) + out) * latent + i];
    }
    return rounded(sum);
  };
  for (int64_t s : {0, 2}) {
    for (int64_t r = 0; r < counts[s]; r += 1 + counts[s] / 5) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t row = head * rows + starts[s] + r, sees = firsts[s] + r + 1;
        std::vector<double> scores(sees);
        double most = -INFINITY, sum = 0;
        for (int64_t k = 0; k < sees; ++k) {
          for (int64_t d = 0; d < of_query; ++d) {
            const double of_key = d < nope ? through(s, head, k, d) : latent_of(s, k, latent + d - nope);
            scores[k] += 0.3 * query.values[row * of_query + d] * of_key;
          }
          most = std::fmax(most, scores[k]);
        }
        for (double& score : scores) sum += score = std::exp(score - most);
        for (int64_t v = 0; v < value; ++v) {
          double wanted = 0;
          for (int64_t k = 0; k < sees; ++k) wanted += scores[k] / sum * through(s, head, k, nope + v);
          const double slack = type == Type::kF32 ? 1e-5 : 1e-2;
          Check(std::fabs(mixed[row * value + v] / total[row] - wanted) <= slack, "expanded", count, cached, block_size);
        }
      }
    }
  }
  // Of each head, the rows from `cut` on.
  const int64_t cut = count / 2, rest = count - cut;
  Array moved(type, heads * rest * of_query);
  for (int64_t head = 0; head < heads; ++head) {
    std::memcpy(moved.data() + head * rest * of_query * item, query.data() + (head * rows + cut) * of_query * item,
                rest * of_query * item);
  }
  std::vector<float> peaks(heads * rest, -INFINITY), totals(heads * rest), alone(heads * rest * value);
  const int32_t start = 0, own = static_cast<int32_t>(rest), first = static_cast<int32_t>(cached + cut);
  RunAttendExpanded(mla, keys, {table.data(), &start, &own, &first, 1, blocks}, rest, 0, 1, moved.data(),
                    {peaks.data(), totals.data(), alone.data()}, kThreads);
  for (int64_t head = 0; head < heads; ++head) {
    const float* there = mixed.data() + (head * rows + cut) * value;
    Check(std::memcmp(alone.data() + head * rest * value, there, rest * value * 4) == 0, "rows of a sequence", count,
          cached, block_size);
  }
}

void TestNorm(Type type, int64_t rows, int64_t width) {
  Array x(type, rows * width), weight(type, width);
  std::vector<float> y(rows * width, NAN);
  RunNorm({x.data(), width * ItemBytes(type), width, type, nullptr, 0}, rows, weight.data(), type, 1e-6f,
          {reinterpret_cast<char*>(y.data()), width, Type::kF32}, kThreads);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += double(x.values[r * width + i]) * x.values[r * width + i];
    for (int64_t i = 0; i < width; ++i) {
      const double wanted = x.values[r * width + i] / std::sqrt(sum / width + 1e-6) * weight.values[i];
      Check(std::fabs(y[r * width + i] - wanted) <= 1e-5 * (1 + std::fabs(wanted)), "norm", rows, 1, width);
    }
  }
}

void TestChoose(int64_t tokens, int64_t experts, int64_t topk, int64_t groups, int64_t topk_groups) {
  Array logits(Type::kF32, tokens * experts), bias(Type::kF32, experts);
  std::vector<float> given = logits.values;
  given[0] = NAN;
  std::vector<int32_t> map(experts + 1);
  for (int64_t e = 0; e <= experts; ++e) map[e] = static_cast<int32_t>(experts - e);
  std::vector<uint8_t> is_valid(tokens, 1);
  is_valid[tokens - 1] = tokens == 1;
  std::vector<int32_t> slots(tokens * (topk + 1), -7);
  std::vector<float> weights(tokens * (topk + 1));
  for (bool is_softmax : {false, true}) {
    const Router router{bias.values.data(), map.data(), experts, 1, topk, groups, topk_groups, is_softmax, !is_softmax,
                        true, 1.0f};
    RunChoose(router, given.data(), is_valid.data(), tokens, slots.data(), weights.data(), kThreads);
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int> times(experts + 1);
      for (int64_t k = 0; k <= topk; ++k) {
        const int32_t slot = slots[t * (topk + 1) + k];
        const bool ok = is_valid[t] ? slot >= 0 && slot <= experts && ++times[slot] == 1 : slot == -1;
        Check(ok, "choose", tokens, experts, topk);
      }
    }
  }
}

// Whatever requests ask for, with `width` rows each: a token is one there is, and the best one where nothing is asked.
void TestSample(int64_t requests, int64_t vocabulary, int64_t width, int64_t longest, int64_t room) {
  const int64_t rows = requests * width, mask_bytes = room == 0 ? 0 : (vocabulary + 7) / 8;
  const int64_t num_words = kSettings + 5 * room + (mask_bytes + 3) / 4 * 2, num_drafts = width;
  Array logits(Type::kF32, rows * vocabulary);
  std::vector<int32_t> words(requests * num_words), positions(rows, 3), history(requests * longest, -1);
  std::vector<int32_t> drafts(requests * num_drafts), tokens(rows, -7);
  const auto any = [vocabulary] { return static_cast<int32_t>(random_bits() % vocabulary); };
  const auto put = [](float value) {
    int32_t word;
    std::memcpy(&word, &value, 4);
    return word;
  };
  for (int64_t r = 0; r < requests; ++r) {
    int32_t* own = words.data() + r * num_words;
    const int32_t first[] = {put(r % 3 * 0.7f), static_cast<int32_t>(random_bits() % (vocabulary + 3)) * (r % 2 == 0),
                             put(r % 4 == 0 ? 0.3f : 1.0f), put(r % 5 == 0 ? 0.1f : 0.0f), put(r % 2 * 0.5f), put(0.3f),
                             put(1.2f), r % 7 == 0 ? 9 : 0, 0, static_cast<int32_t>(random_bits()), 7};
    std::copy(std::begin(first), std::end(first), own);
    int32_t* at = own + kSettings;
    for (int64_t i = 0; i < room; ++i) *at++ = i % 3 == 2 ? -1 : any() + (i % 5 == 4 ? 1000000 : 0);
    for (int64_t i = 0; i < room; ++i) *at++ = put(Draw());
    for (int64_t i = 0; i < room; ++i) *at++ = i < room / 2 ? any() : -1;
    for (int64_t i = 0; i < room; ++i) *at++ = any();
    for (int64_t i = 0; i < room; ++i) *at++ = i < room - 1 ? static_cast<int32_t>((room - i) % 3) : -1;
    for (; at < own + num_words; ++at) *at = static_cast<int32_t>(random_bits());
    for (int64_t i = 0; i < longest * (r + 1) / requests; ++i) history[r * longest + i] = any();
    for (int64_t i = 0; i < num_drafts; ++i) drafts[r * num_drafts + i] = any();
  }
  Sampler all{reinterpret_cast<const float*>(logits.data()), words.data(), positions.data(), history.data(),
              drafts.data(), vocabulary, width, 1, longest, num_drafts, num_words, room, room, room, mask_bytes, -2, -3};
  all.first = width == 1 ? 1 : 0;
  RunSample(all, rows, tokens.data(), kThreads);
  for (int32_t token : tokens) Check(token == -3 || (token >= 0 && token < vocabulary), "sample", rows, vocabulary, room);
  all.num_words = all.longest = all.num_drafts = 0;
  RunSample(all, rows, tokens.data(), kThreads);
  for (int64_t r = 0; r < rows; ++r) {
    const float* own = logits.values.data() + r * vocabulary;
    Check(tokens[r] == std::max_element(own, own + vocabulary) - own, "best token", rows, vocabulary, room);
  }
}

void TestPack(Type type, int64_t tokens, int64_t topk, int64_t ranks, int64_t local, int64_t width, bool is_int8) {
  const int64_t num_slots = ranks * local, stride = is_int8 ? width + 9 : width * ItemBytes(type);
  Array x(type, tokens * width);
  std::vector<int32_t> slots(tokens * topk), position(slots.size()), offsets(num_slots), counts(num_slots);
  std::vector<int32_t> announced(2 * num_slots), received(4 * num_slots);
  for (int32_t& slot : slots) slot = static_cast<int32_t>(random_bits() % (num_slots + 2)) - 1;  // one too high, too
  std::vector<char> packed(slots.size() * stride);
  RunPack({x.data(), width * ItemBytes(type), width, type, nullptr, 0}, slots.data(), tokens, topk, ranks, local,
          {packed.data(), stride, is_int8 ? width + 3 : -1, position.data(), offsets.data(), counts.data(),
           announced.data()},
          kThreads);
  std::vector<int32_t> seen(num_slots);
  for (int64_t c = 0; c < tokens * topk; ++c) {
    const bool is_slot = slots[c] >= 0 && slots[c] < num_slots;
    const int32_t wanted = is_slot ? offsets[slots[c]] + seen[slots[c]]++ : -1;
    Check(position[c] == wanted, "place of a packed row", tokens, topk, num_slots);
    if (is_slot && !is_int8) {
      Check(std::memcmp(packed.data() + wanted * stride, x.data() + c / topk * stride, stride) == 0, "packed row", tokens,
            topk, num_slots);
    }
  }
  Check(seen == counts, "packed rows", tokens, topk, num_slots);
  int32_t* at = received.data();
  RunLayOut(announced.data(), ranks, local, at, at + num_slots, at + 2 * num_slots, at + 3 * num_slots);
  Check(std::memcmp(at, counts.data(), num_slots * 4) == 0, "counts", tokens, topk, num_slots);
}

}  // namespace

int main() {
  for (const char* form : {"Portable", "Avx2", "Avx512", "Avx512Bf16"}) {
    if (!UseForm(form)) continue;
    std::printf("%s\n", form);
    for (Type type : {Type::kF32, Type::kBF16, Type::kS8}) {
      for (int64_t rows : {23, 24, 79, 80, 81}) TestProduct(type, rows, 70, 130);
      for (int64_t rows : {0, 1, 2, 5, 7, 49, 97, 200}) {
        for (int64_t out : {1, 3, 4, 65, 130}) {
          for (int64_t in : {1, 7, 16, 31, 64, 97}) TestProduct(type, rows, out, in);
        }
      }
      TestProduct(type, 3, 700, 512);  // large enough for helpers
      TestProduct(type, 300, 384, 1100);  // rows of more than one group
      TestProduct(type, 300, 70, 130);    // few columns: rows are shared out
      TestProduct(type, 600, 3, 97);
      TestExperts(type, {}, 5, 3);
      TestExperts(type, {0}, 5, 3);
      TestExperts(type, {1, 0, 49, 7, 0, 97}, 37, 29);
      TestExperts(type, {0, 0, 130}, 64, 66);
      TestExpertRows(type, type, kThreads);
      TestExpertRows(type, type, {0, nullptr});
      if (type == Type::kS8) TestExpertRows(type, Type::kBF16, kThreads);
      for (int64_t tokens : {1, 5, 400}) TestPack(type, tokens, 3, 4, 3, 31, false);
      if (type == Type::kS8) continue;
      for (int64_t tokens : {1, 5, 400}) TestPack(type, tokens, 8, 1, 7, 33, true);
      for (int64_t width : {1, 16, 31, 97}) TestNorm(type, 5, width);
      TestNorm(type, 300, 512);
      for (int64_t count : {1, 7, 26, 135}) {
        for (int64_t cached : {0, 3, 128, 250}) TestExpanded(type, count, cached, count % 2 ? 16 : 3, count % 3 ? 7 : 16);
      }
      for (int64_t tokens : {1, 2, 9}) {
        for (int64_t block_size : {1, 3, 16}) {
          for (int64_t length : {0, 1, 6, 17, 96}) {
            TestAttention(type, tokens, block_size, static_cast<int32_t>(std::min(length, 6 * block_size)));
          }
        }
      }
    }
    for (int64_t tokens : {1, 5, 300}) {
      TestSample(tokens, 1, 1, 0, 0);
      TestSample(tokens, 64, 2, 5, 7);
      TestSample(tokens, 131, 1, 9, 3);
      TestSample(tokens, 1000, 3, 2, 0);
      TestChoose(tokens, 1, 1, 1, 1);
      TestChoose(tokens, 24, 3, 6, 2);
      TestChoose(tokens, 24, 24, 24, 1);
      TestChoose(tokens, 96, 8, 8, 4);
    }
  }
  UseForm("");
  std::puts("ok");
}
