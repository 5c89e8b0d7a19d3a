// Which form runs, and how an operator is cut into tasks for the threads at hand.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

namespace cmjax {
namespace {

constexpr int64_t kKeptScratch = 4 << 20;

const Form* const kForms[] = {
#if defined(__x86_64__)
#if !defined(CMJAX_WITHOUT_BF16)
    &kAvx512Bf16,
#endif
    &kAvx512, &kAvx2,
#endif
    &kPortable};

bool CpuRuns(const Form& form) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  if (&form == &kAvx512) return has_avx512;
#if !defined(CMJAX_WITHOUT_BF16)
  if (&form == &kAvx512Bf16) return has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (&form == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &form == &kPortable;
}

const Form* BestForm() {
#if defined(__x86_64__)
  // Intel's bfloat16 instruction takes two cycles, longer than its values taken apart and two float32 ones.
  if (__builtin_cpu_is("intel") && CpuRuns(kAvx512)) return &kAvx512;
#endif
  return *std::find_if(std::begin(kForms), std::end(kForms), [](const Form* form) { return CpuRuns(*form); });
}

std::atomic<const Form*>& Current() {
  static std::atomic<const Form*> current{BestForm()};
  return current;
}

struct Memory {
  std::unique_ptr<char[]> data;
  int64_t size = 0;
};

Memory& MemoryOf(int which) {
  thread_local Memory memory[2];
  return memory[which];
}

// Memory of this thread that lives until its next call with the same `which`; nothing is cleared.
char* Scratch(int which, int64_t bytes) {
  Memory& own = MemoryOf(which);
  if (own.size < bytes + 64) {
    own = Memory{};
    own.data.reset(new char[bytes + 64]);
    own.size = bytes + 64;
  }
  return own.data.get() + (64 - reinterpret_cast<uintptr_t>(own.data.get()) % 64) % 64;
}

// Gives back what a large call has taken: every thread of hundreds would keep it.
void TrimScratch(int which) {
  if (MemoryOf(which).size > kKeptScratch) MemoryOf(which) = Memory{};
}

struct Job {
  std::function<void(int64_t)> task;
  int64_t count;
  std::atomic<int64_t> next{0}, finished{0};

  void Work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(i);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

// task(0) .. task(count - 1). The caller takes part, and waits only for tasks that a helper is at: a helper that never
// comes is not missed, so that callers on all threads of a pool cannot wait for each other.
void Parallel(const Helpers& helpers, int64_t count, std::function<void(int64_t)> task) {
  const int64_t num_helpers = std::min<int64_t>(helpers.count, count - 1);
  if (num_helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto job = std::make_shared<Job>();
  job->task = std::move(task);
  job->count = count;
  for (int64_t i = 0; i < num_helpers; ++i) helpers.schedule([job] { job->Work(); });
  job->Work();
  for (int spins = 0; job->finished.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 200) std::this_thread::yield();
  }
}

const Helpers kAlone{0, nullptr};

// The helpers, or none for little work, for which they, who have to be woken, come too late: bytes of weights and
// multiplications, as nanoseconds of one core.
const Helpers& HelpFor(int64_t num_rows, int64_t values, int64_t item_bytes, const Helpers& helpers) {
  return values * item_bytes / 12 + num_rows * values / 40 > 8000 ? helpers : kAlone;
}

// task(row) for all rows, each of which takes about `values` cheap operations.
template <class Task>
void InBlocks(const Helpers& helpers, int64_t num_rows, int64_t values, const Task& task) {
  const bool is_large = num_rows * values > 100000;
  const int64_t blocks = is_large ? std::min<int64_t>(num_rows, 4 * (helpers.count + 1)) : 1;
  Parallel(is_large ? helpers : kAlone, blocks, [&](int64_t i) {
    for (int64_t row = num_rows * i / blocks; row < num_rows * (i + 1) / blocks; ++row) task(row);
  });
}

}  // namespace

const Form& CurrentForm() { return *Current().load(std::memory_order_relaxed); }

bool UseForm(const char* name) {
  if (*name == '\0') {
    Current() = BestForm();
    return true;
  }
  for (const Form* form : kForms) {
    if (std::strcmp(form->name, name) == 0 && CpuRuns(*form)) {
      Current() = form;
      return true;
    }
  }
  return false;
}

void RunProduct(const Rows& rows, int64_t num_rows, const Matrix& w, Type dtype, const Target& target,
                const Helpers& helpers) {
  const Form& form = CurrentForm();
  const Helpers& help = HelpFor(num_rows, w.out * w.in, ItemBytes(w.type), helpers);
  Staged staged{const_cast<char*>(rows.data), rows.stride, nullptr, form.is_by_lane(w.type, num_rows)};
  if (staged.is_by_lane || !form.reads_in_place(rows, w.type)) {
    staged.stride = StagedStride(rows.width);
    staged.data = Scratch(0, num_rows * (staged.stride + 4));
    staged.scales = reinterpret_cast<float*>(staged.data + num_rows * staged.stride);
    const int64_t blocks = (num_rows + kRowBlock - 1) / kRowBlock;
    Parallel(staged.is_by_lane || num_rows >= 4 * kRowBlock ? help : kAlone, blocks, [&](int64_t i) {
      const int64_t first = i * kRowBlock, here = std::min(kRowBlock, num_rows - first);
      auto* floats = reinterpret_cast<float*>(Scratch(1, StagedStride(rows.width)));
      const Staged to{staged.data + first * staged.stride, staged.stride, staged.scales + first, staged.is_by_lane};
      form.stage(rows, first, here, w.type, dtype, to, floats);
    });
  }
  // A few tasks a thread, so that none waits long for another; whole blocks of columns where there are many, and several
  // blocks of rows where there are few.
  const int64_t wanted = help.count == 0 ? 1 : 4 * (help.count + 1);
  const int64_t step = w.out / wanted >= kColBlock ? kColBlock : staged.is_by_lane ? kLaid : 16;
  const int64_t cols = std::max(step, (w.out / wanted + step - 1) / step * step), across = (w.out + cols - 1) / cols;
  if (across == 0) return;
  const int64_t blocks = staged.is_by_lane ? std::min((wanted + across - 1) / across, num_rows / kManyBlock) : 1;
  const int64_t down = std::max<int64_t>(1, blocks);
  Parallel(help, across * down, [&](int64_t i) {
    const int64_t col = i % across * cols, row = num_rows * (i / across) / down;
    const int64_t rows_here = num_rows * (i / across + 1) / down - row;
    const Staged own{staged.data + row * staged.stride, staged.stride,
                     staged.scales == nullptr ? nullptr : staged.scales + row, staged.is_by_lane};
    Target to = target;
    to.data += row * target.width * ItemBytes(target.type);
    form.product(own, rows_here, w, col, std::min(cols, w.out - col), to,
                 Scratch(1, ProductScratch(w.in, staged.is_by_lane)));
    TrimScratch(1);
  });
  TrimScratch(0);
}

void RunExperts(const Rows& rows, const int32_t* counts, const Experts& experts, const Target& target,
                const Helpers& helpers) {
  const Form& form = CurrentForm();
  struct Part {
    int64_t expert, first, num_rows;
    bool is_by_lane;
  };
  std::vector<Part> parts;
  const int64_t total = std::accumulate(counts, counts + experts.count, int64_t{0});
  const int64_t share = (total + helpers.count) / (helpers.count + 1);  // of a thread
  int64_t first = 0;
  for (int64_t e = 0; e < experts.count; ++e) {
    // Blocks of about one size, in whole tiles of rows.
    const bool is_by_lane = form.is_by_lane(experts.w13.type, counts[e]);
    const int64_t most = is_by_lane ? std::min(kManyBlock, std::max(kRowBlock, share)) : kRowBlock;
    const int64_t blocks = (counts[e] + most - 1) / most;
    for (int64_t i = 0, done = 0; i < blocks; ++i) {
      const int64_t end = i + 1 == blocks ? counts[e] : (counts[e] * (i + 1) / blocks + 6) / 12 * 12;
      parts.push_back({e, first + done, end - done, is_by_lane});
      done = end;
    }
    first += counts[e];
  }
  const int64_t hidden = experts.w2.out, ffn = experts.w2.in;
  const int64_t rows_a_part = parts.empty() ? 0 : first / static_cast<int64_t>(parts.size());
  const int64_t values = 3 * hidden * ffn * static_cast<int64_t>(parts.size());
  const Helpers& help = HelpFor(rows_a_part, values, ItemBytes(experts.w13.type), helpers);
  Parallel(help, static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part& part = parts[i];
    const auto own = [&part](Matrix w) {
      w.data += part.expert * w.out * w.in * ItemBytes(w.type);
      if (w.scale != nullptr) w.scale += part.expert * w.out;
      return w;
    };
    Target to = target;
    to.data += part.first * target.width * ItemBytes(target.type);
    form.expert(rows, part.first, part.num_rows, part.is_by_lane, own(experts.w13), own(experts.w2), to,
                Scratch(1, ExpertScratch(hidden, ffn, part.num_rows, part.is_by_lane)));
    TrimScratch(1);
  });
}

void RunNorm(const Rows& rows, int64_t num_rows, const char* weight, Type weight_type, float eps, const Target& target,
             const Helpers& helpers) {
  const Form& form = CurrentForm();
  InBlocks(helpers, num_rows, rows.width, [&](int64_t row) {
    form.norm(rows, row, weight, weight_type, eps, target, reinterpret_cast<float*>(Scratch(1, Padded(rows.width) * 4)));
  });
}

void RunChoose(const Router& router, const float* logits, const uint8_t* is_valid, int64_t tokens, int32_t* slots,
               float* weights, const Helpers& helpers) {
  const Form& form = CurrentForm();
  const int64_t width = router.topk + router.shared;
  InBlocks(helpers, tokens, router.experts * router.topk, [&](int64_t t) {
    if (is_valid[t]) {
      form.choose(router, logits + t * router.experts, slots + t * width, weights + t * width,
                  Scratch(1, ChooseScratch(router)));
    } else {
      std::fill_n(slots + t * width, width, -1);
      std::fill_n(weights + t * width, width, 0.0f);
    }
  });
}

void RunSample(const Sampler& all, int64_t num_rows, int32_t* tokens, const Helpers& helpers) {
  const Form& form = CurrentForm();
  const bool is_greedy = all.num_words == 0;
  InBlocks(helpers, num_rows, (is_greedy ? 2 : 20) * all.vocabulary, [&](int64_t row) {
    tokens[row] = form.sample(all, row, is_greedy ? nullptr : Scratch(1, SampleScratch(all)));
  });
}

void RunPack(const Rows& rows, const int32_t* slots, int64_t tokens, int64_t topk, int64_t num_ranks, int64_t num_local,
             const Packed& packed, const Helpers& helpers) {
  const int64_t num_slots = num_ranks * num_local, choices = tokens * topk;
  const auto is_slot = [num_slots](int32_t slot) { return slot >= 0 && slot < num_slots; };
  std::fill_n(packed.counts, num_slots, 0);
  for (int64_t c = 0; c < choices; ++c) {
    if (is_slot(slots[c])) ++packed.counts[slots[c]];
  }
  int32_t next = 0;
  for (int64_t s = 0; s < num_slots; ++s) {
    packed.offsets[s] = next;
    next += packed.counts[s];
    int32_t* told = packed.announced + s / num_local * 2 * num_local + s % num_local;
    told[0] = packed.counts[s];
    told[num_local] = packed.offsets[s];
  }
  // `offsets` count up while rows are placed, and are put back.
  for (int64_t c = 0; c < choices; ++c) packed.position[c] = is_slot(slots[c]) ? packed.offsets[slots[c]]++ : -1;
  for (int64_t s = 0; s < num_slots; ++s) packed.offsets[s] -= packed.counts[s];

  const Form& form = CurrentForm();
  const int64_t row_bytes = rows.width * ItemBytes(rows.type);
  InBlocks(helpers, tokens, topk * packed.stride, [&](int64_t t) {
    const char* from = rows.data + t * rows.stride;
    int64_t size = row_bytes;
    const int32_t* position = packed.position + t * topk;
    if (packed.scale_at >= 0 && std::any_of(position, position + topk, [](int32_t at) { return at >= 0; })) {
      size = packed.stride;
      auto* floats = reinterpret_cast<float*>(Scratch(1, packed.stride + Padded(rows.width) * 4));
      char* message = reinterpret_cast<char*>(floats + Padded(rows.width));
      std::memset(message + rows.width, 0, packed.stride - rows.width);
      const float scale = form.quantize(rows, t, reinterpret_cast<int8_t*>(message), floats);
      std::memcpy(message + packed.scale_at, &scale, sizeof(scale));
      from = message;
    }
    for (int64_t k = 0; k < topk; ++k) {
      if (position[k] >= 0) std::memcpy(packed.data + position[k] * packed.stride, from, size);
    }
  });
}

void RunLayOut(const int32_t* announced, int64_t num_ranks, int64_t num_local, int32_t* counts, int32_t* source_offsets,
               int32_t* offsets, int32_t* totals) {
  for (int64_t r = 0; r < num_ranks; ++r) {
    std::copy_n(announced + 2 * r * num_local, num_local, counts + r * num_local);
    std::copy_n(announced + (2 * r + 1) * num_local, num_local, source_offsets + r * num_local);
  }
  int32_t next = 0;
  for (int64_t e = 0; e < num_local; ++e) {
    const int32_t first = next;
    for (int64_t r = 0; r < num_ranks; ++r) {
      offsets[r * num_local + e] = next;
      next += counts[r * num_local + e];
    }
    totals[e] = next - first;
  }
}

void RunAbsorb(const Mla& mla, const char* q_nope, const char* q_pe, int64_t tokens, char* query,
               const Helpers& helpers) {
  const Form& form = CurrentForm();
  const Helpers& help = HelpFor(tokens, mla.heads * mla.nope * mla.latent, ItemBytes(mla.type), helpers);
  Parallel(help, mla.heads, [&](int64_t head) {
    auto* scratch = reinterpret_cast<float*>(Scratch(1, AbsorbScratch(mla)));
    form.absorb(mla, q_nope, q_pe, tokens, head, query, scratch);
  });
}

void RunAttend(const Mla& mla, const Keys& keys, const Requests& requests, int64_t index, int64_t count,
               const char* query, const Softmax& state, const Helpers& helpers) {
  const Form& form = CurrentForm();
  const int64_t tokens = requests.tokens / requests.count, width = mla.latent + mla.rope;
  int64_t num_keys = 0;
  for (int64_t t = 0; t < requests.tokens; ++t) num_keys += std::max(requests.lengths[t], 0);
  const Helpers& help = HelpFor(2 * mla.heads, num_keys * width / count, ItemBytes(mla.type), helpers);
  Parallel(help, requests.count, [&](int64_t r) {
    const int32_t* lengths = requests.lengths + r * tokens;
    const int64_t longest = std::max<int64_t>(0, *std::max_element(lengths, lengths + tokens));
    const int64_t blocks = std::min((longest + keys.block_size - 1) / keys.block_size, requests.max_blocks);
    const int64_t unit = ChunkBlocks(keys.block_size), units = (blocks + unit - 1) / unit;
    const int64_t first = units * index / count * unit, end = std::min(units * (index + 1) / count * unit, blocks);
    if (first >= end) return;
    const int64_t row = r * tokens * mla.heads;
    form.attend(mla, keys, requests.table + r * requests.max_blocks, lengths, tokens, first, end,
                query + row * width * ItemBytes(mla.type),
                {state.peak + row, state.total + row, state.mixed + row * width},
                Scratch(1, AttendScratch(mla, tokens)));
  });
}

void RunAttendExpanded(const Mla& mla, const Keys& keys, const Sequences& sequences, int64_t num_rows, int64_t index,
                       int64_t count, const char* query, const Softmax& state, const Helpers& helpers) {
  const Form& form = CurrentForm();
  struct Part {
    Sequence sequence;
    int64_t start, first, end;
  };
  std::vector<Part> parts;
  const auto of = [&](int64_t s) {
    return Sequence{sequences.table + s * sequences.max_blocks, sequences.max_blocks,
                    std::max(sequences.counts[s], 0), sequences.first_positions[s]};
  };
  const auto chunks_of = [](const Sequence& one) {
    return one.count == 0 ? 0 : (one.first_position + one.count + kExpandChunk - 1) / kExpandChunk;
  };
  int64_t all = 0, before = 0, values = 0;
  for (int64_t s = 0; s < sequences.count; ++s) all += chunks_of(of(s));
  const int64_t first = all * index / count, end = all * (index + 1) / count;
  for (int64_t s = 0; s < sequences.count; ++s) {
    const Sequence one = of(s);
    const int64_t chunks = chunks_of(one), own_first = std::clamp<int64_t>(first - before, 0, chunks);
    const int64_t own_end = std::clamp<int64_t>(end - before, 0, chunks);
    before += chunks;
    if (own_first == own_end) continue;
    parts.push_back({one, sequences.starts[s], own_first, own_end});
    const int64_t num_keys = std::min((own_end - own_first) * kExpandChunk, one.first_position + one.count);
    values += num_keys * (mla.latent + one.count / 2) * (mla.nope + mla.value);
  }
  const Helpers& help = HelpFor(mla.heads, values, 0, helpers);
  Parallel(help, static_cast<int64_t>(parts.size()) * mla.heads, [&](int64_t i) {
    const Part& part = parts[i / mla.heads];
    const int64_t head = i % mla.heads, row = head * num_rows + part.start;
    form.attend_expanded(mla, keys, part.sequence, head, part.first, part.end,
                         query + row * (mla.nope + mla.rope) * ItemBytes(mla.type),
                         {state.peak + row, state.total + row, state.mixed + row * mla.value},
                         Scratch(1, ExpandedScratch(mla)));
    TrimScratch(1);
  });
}

void RunRelease(const Mla& mla, const Softmax& state, int64_t tokens, char* out, const Helpers& helpers) {
  const Form& form = CurrentForm();
  const Helpers& help = HelpFor(tokens, mla.heads * mla.value * mla.latent, ItemBytes(mla.type), helpers);
  Parallel(help, mla.heads, [&](int64_t head) {
    form.release(mla, state, tokens, head, out, Scratch(1, ReleaseScratch(mla, tokens)));
  });
}

}  // namespace cmjax
