// What the operators take, and the forms of their inner loops that a CPU can run. Nothing here knows about XLA.
#pragma once

#include <cstdint>
#include <functional>

namespace cmjax {

enum class Type : int32_t { kF32, kBF16, kS8 };

// Activations in memory. int8 rows have a float32 scale each: in `scales`, or inside the row at byte `scale_at`.
struct Rows {
  const char* data;
  int64_t stride;  // bytes from one row to the next
  int64_t width;
  Type type;
  const float* scales;
  int64_t scale_at;
};

// A matrix [out, in]; an int8 one has a scale for each output.
struct Matrix {
  const char* data;
  const float* scale;
  int64_t out, in;
  Type type;
};

// Rows in the form that products read: padded with zeros up to whole vectors; or by lane, see columns.h.
struct Staged {
  char* data;
  int64_t stride;  // bytes
  float* scales;   // of int8 rows
  bool is_by_lane;
};

// Where a product's results go, as `type`.
struct Target {
  char* data;
  int64_t width;  // values from one row to the next
  Type type;
};

// What latent attention has of one layer: kv_b [heads, nope + value, latent]. Everything is of `type`, a float.
struct Mla {
  const char* kv_b;
  int64_t heads, nope, rope, value, latent;
  float scale;  // of scores
  Type type;
};

// A layer of the cache, [slots, latent + rope], in blocks.
struct Keys {
  const char* data;
  int64_t num_slots, block_size;
};

// A running softmax over rows: the largest score, the sum, and the values summed. Absorbed, rows are [tokens, heads] and
// values [latent + rope]; expanded, [heads, tokens] and [value].
struct Softmax {
  float *peak, *total, *mixed;
};

// Queries of one sequence, side by side: `count` of them from position `first_position` on, whose last one sees all keys.
struct Sequence {
  const int32_t* table;
  int64_t max_blocks, count, first_position;
};

// How tokens are chosen of logits [rows, vocabulary]. Row r belongs to request r / width, and has first + r % width of the
// request's drafts [requests, num_drafts] behind its history [requests, longest], -1 padded. `words` [requests, num_words]
// are settings, see sampling.h: kSettings of one value each, then lists. Without any, the best token is chosen.
constexpr int64_t kSettings = 11;
struct Sampler {
  const float* logits;
  const int32_t *words, *positions, *history, *drafts;
  int64_t vocabulary, width, first, longest, num_drafts;
  int64_t num_words, num_bias, num_stop, num_word_tokens, num_mask_bytes;
  int32_t not_finite, nothing_allowed;  // in place of a token
};

// Rows that an expert takes at a time, and how many where they are staged by lane; columns of a block of results, which
// stays in the first-level cache; at most so many columns laid side by side, see columns.h; the widest vector; keys that
// absorbed attention takes at a time, and expanded attention, and how many queries these meet together.
constexpr int64_t kRowBlock = 48, kManyBlock = 144, kColBlock = 64, kLaid = 32, kPad = 64, kChunk = 64;
constexpr int64_t kExpandChunk = 128, kExpandRows = 24;

// Rows of a product whose columns are laid side by side stay in the second-level cache.
constexpr int64_t kRowsBytes = 1 << 20;

inline int64_t Padded(int64_t width) { return (width + kPad - 1) / kPad * kPad; }
inline int64_t ItemBytes(Type type) { return type == Type::kF32 ? 4 : type == Type::kBF16 ? 2 : 1; }

// Bytes that one row takes when staged, at most, and the scratch memory of a form's calls.
inline int64_t StagedStride(int64_t width) { return Padded(width) * 4; }
inline int64_t ColumnsScratch(int64_t in) { return Padded(kLaid * 4) + kLaid * StagedStride(in); }
inline int64_t ProductScratch(int64_t in, bool is_by_lane) {
  return kRowBlock * kColBlock * 4 + (is_by_lane ? ColumnsScratch(in) : 0);
}
inline int64_t ExpertScratch(int64_t hidden, int64_t ffn, int64_t rows, bool is_by_lane) {
  const int64_t widest = hidden > ffn ? hidden : ffn, values = 2 * rows * kColBlock * 4;
  return rows * (StagedStride(hidden) + StagedStride(ffn) + Padded(ffn) * 4) + 2 * Padded(rows * 4) +
         StagedStride(widest) + values + ProductScratch(widest, is_by_lane);
}

inline int64_t AbsorbScratch(const Mla& mla) {
  return ((mla.nope + 1) * Padded(mla.latent) + Padded(mla.nope)) * 4;
}
inline int64_t AttendScratch(const Mla& mla, int64_t tokens) {
  const int64_t rows = tokens * mla.heads, padded = Padded(mla.latent + mla.rope);
  return (2 * rows * padded + 2 * kChunk * padded + rows * kChunk) * 4;
}
inline int64_t ExpandedScratch(const Mla& mla) {
  const int64_t latent = Padded(mla.latent), nope = Padded(mla.nope), rope = Padded(mla.rope), value = Padded(mla.value);
  const int64_t keys = kExpandChunk * (2 * latent + nope + 2 * rope + value);
  return ((nope + value) * latent + keys + kExpandRows * (kExpandChunk + nope + rope + value)) * 4;
}
inline int64_t SampleScratch(const Sampler& all) { return 2 * Padded(all.vocabulary) * 4; }
// Blocks that attention takes together: parts of its keys consist of so many.
inline int64_t ChunkBlocks(int64_t block_size) { return block_size < kChunk ? kChunk / block_size : 1; }
inline int64_t ReleaseScratch(const Mla& mla, int64_t tokens) {
  return (tokens + 2) * StagedStride(mla.latent) + ProductScratch(mla.latent, false);
}

// How scores become choices of `topk` of the `experts`, and those slots; then come `shared` experts that get every token.
struct Router {
  const float* bias;              // [experts], or null
  const int32_t* expert_to_slot;  // [experts + shared]
  int64_t experts, shared, topk, groups, topk_groups;
  bool is_softmax, by_best_two, is_normalized;
  float scale;
};
inline int64_t ChooseScratch(const Router& router) { return (2 * Padded(router.experts) + Padded(router.groups)) * 4; }

// How products by matrices of one type are made.
struct Tiling {
  int64_t step;           // values of a row that a product takes at a time
  int64_t tile_rows;      // rows that take the weights as they are read once, at most
  int64_t many_rows;      // so many rows are staged by lane, and columns laid side by side: 12 or more, see columns.h
  int64_t many_tile;      // rows that take the weights as they are read once, there
  bool is_read_in_place;  // rows of the matrix's own type, where they are whole steps and fewer
};

// One form of the inner loops. Results of a row never depend on the rows beside it.
struct Form {
  const char* name;
  Tiling tiling[3];  // by the type of the matrix
  bool is_by_lane(Type weights, int64_t num_rows) const {
    return num_rows >= tiling[static_cast<int>(weights)].many_rows;
  }
  // Whether products by matrices of `weights` can read these rows where they are.
  bool reads_in_place(const Rows& rows, Type weights) const {
    const Tiling& own = tiling[static_cast<int>(weights)];
    return rows.type == weights && own.is_read_in_place && rows.width % own.step == 0;
  }
  // Stages `count` rows from `first` on for matrices of `weights`, to `staged` as that says; floats are first rounded to
  // `dtype`. `floats` is scratch memory for one padded row.
  void (*stage)(const Rows& rows, int64_t first, int64_t count, Type weights, Type dtype, const Staged& staged,
                float* floats);
  // target[0:num_rows, first:first + count] = rows * matrix^T for outputs from `first` on.
  void (*product)(const Staged& rows, int64_t num_rows, const Matrix& w, int64_t first, int64_t count,
                  const Target& target, char* scratch);
  // target[0:num_rows] = w2 (silu(gate) * up), where w13 gives gate and up. Values between the two products are rounded
  // to the target's type.
  void (*expert)(const Rows& rows, int64_t first, int64_t num_rows, bool is_by_lane, const Matrix& w13, const Matrix& w2,
                 const Target& target, char* scratch);
  // to = the row in int8; its scale is returned. `floats` is scratch memory for one padded row.
  float (*quantize)(const Rows& rows, int64_t row, int8_t* to, float* floats);
  // target[row] = the row by its root mean square, times `weight` of `weight_type`.
  void (*norm)(const Rows& rows, int64_t row, const char* weight, Type weight_type, float eps, const Target& target,
               float* floats);
  // slots[topk + shared] and weights[topk + shared] of the token with these logits.
  void (*choose)(const Router& router, const float* logits, int32_t* slots, float* weights, char* scratch);
  // query[tokens, head] = (q_nope of the head through the key part of kv_b, q_pe), all heads being side by side.
  void (*absorb)(const Mla& mla, const char* q_nope, const char* q_pe, int64_t tokens, int64_t head, char* query,
                 float* scratch);
  // The queries of one request's tokens meet the keys in its blocks [first, end); token t sees lengths[t] keys.
  void (*attend)(const Mla& mla, const Keys& keys, const int32_t* table, const int32_t* lengths, int64_t tokens,
                 int64_t first, int64_t end, const char* query, const Softmax& state, char* scratch);
  // out[tokens, head] = the head's means through the value part of kv_b.
  void (*release)(const Mla& mla, const Softmax& state, int64_t tokens, int64_t head, char* out, char* scratch);
  // A sequence's queries of one head, [count, nope + rope], meet chunks [first, end) of kExpandChunk keys each, at most
  // those that there are; `state` is of the first of these rows.
  void (*attend_expanded)(const Mla& mla, const Keys& keys, const Sequence& sequence, int64_t head, int64_t first,
                          int64_t end, const char* query, const Softmax& state, char* scratch);
  // The token of a row.
  int32_t (*sample)(const Sampler& all, int64_t row, char* scratch);
};

// The forms that this build has, best first, and whether this CPU runs them.
extern const Form kPortable;
#if defined(__x86_64__)
extern const Form kAvx2, kAvx512, kAvx512Bf16;
#endif

// The best form that this CPU runs, or the one named by UseForm.
const Form& CurrentForm();
// False where there is no such form, or the CPU cannot run it; "" goes back to the best one.
bool UseForm(const char* name);

// Threads that help the calling one: `schedule` runs a function on one of them, some time.
struct Helpers {
  int count;
  std::function<void(std::function<void()>)> schedule;
};

// target[0:num_rows] = rows * w^T; `dtype`, kF32 or kBF16, is what rows are rounded to for matrices of floats.
void RunProduct(const Rows& rows, int64_t num_rows, const Matrix& w, Type dtype, const Target& target,
                const Helpers& helpers);

// One matrix for each expert: where the first one is, the others follow.
struct Experts {
  Matrix w13, w2;
  int64_t count;
};

// Expert e takes the counts[e] rows behind those of the experts before it; `counts` must not exceed the buffers.
void RunExperts(const Rows& rows, const int32_t* counts, const Experts& experts, const Target& target,
                const Helpers& helpers);

// See Form::norm.
void RunNorm(const Rows& rows, int64_t num_rows, const char* weight, Type weight_type, float eps, const Target& target,
             const Helpers& helpers);

// See Form::choose; tokens that are not valid go nowhere (-1), with weight 0.
void RunChoose(const Router& router, const float* logits, const uint8_t* is_valid, int64_t tokens, int32_t* slots,
               float* weights, const Helpers& helpers);

// See Form::sample.
void RunSample(const Sampler& all, int64_t num_rows, int32_t* tokens, const Helpers& helpers);

// Rows sorted by the slots that they go to, of each rank `num_local`; those of a slot stay in order.
struct Packed {
  char* data;        // [tokens * topk, stride]: a row for each choice
  int64_t stride;    // bytes of a row
  int64_t scale_at;  // -1: rows as they are; else they become int8, with the scale at this byte
  int32_t *position, *offsets, *counts;  // [tokens, topk], -1 for none; [slots]; [slots]
  int32_t* announced;                    // [ranks, 2, num_local]: what each rank is told, counts and offsets
};
void RunPack(const Rows& rows, const int32_t* slots, int64_t tokens, int64_t topk, int64_t num_ranks, int64_t num_local,
             const Packed& packed, const Helpers& helpers);

// Where received rows lie, grouped by local expert: of announced [ranks, 2, num_local] the counts and offsets apart,
// where each rank's rows for each expert begin here, and the rows of each expert.
void RunLayOut(const int32_t* announced, int64_t num_ranks, int64_t num_local, int32_t* counts, int32_t* source_offsets,
               int32_t* offsets, int32_t* totals);

// The queries of all heads, see Form::absorb; their meeting with share `index` of `count` of the keys of each request,
// which has tokens / requests of them and `max_blocks` entries of `table`; and what comes of them, [tokens, heads * value].
void RunAbsorb(const Mla& mla, const char* q_nope, const char* q_pe, int64_t tokens, char* query,
               const Helpers& helpers);
struct Requests {
  const int32_t *table, *lengths;
  int64_t count, max_blocks, tokens;
};
void RunAttend(const Mla& mla, const Keys& keys, const Requests& requests, int64_t index, int64_t count,
               const char* query, const Softmax& state, const Helpers& helpers);
// Queries [heads, rows, nope + rope] of packed sequences meet share `index` of `count` of the chunks of all sequences in a
// row. Sequence s has counts[s] rows from starts[s] on, behind those of the sequences before it and within `num_rows`.
struct Sequences {
  const int32_t *table, *starts, *counts, *first_positions;
  int64_t count, max_blocks;
};
void RunAttendExpanded(const Mla& mla, const Keys& keys, const Sequences& sequences, int64_t num_rows, int64_t index,
                       int64_t count, const char* query, const Softmax& state, const Helpers& helpers);
void RunRelease(const Mla& mla, const Softmax& state, int64_t tokens, char* out, const Helpers& helpers);

}  // namespace cmjax
