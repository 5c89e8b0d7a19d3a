#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "sum.h"

namespace cmjax {
namespace {

// Below this many bytes one thread moves everything: waking a second one costs more.
constexpr int64_t kShareBytes = 128 << 10;
// An all_to_all is moved in blocks of sources x destinations that keep few pages in use.
constexpr int kSourceBlock = 8;
constexpr int kTargetBlock = 32;
// Payloads past this size are out of the caches before anyone reads them: writing around the caches saves reading
// every destination line first. Small chunks are joined on the way, since only whole cache lines gain by it.
constexpr int64_t kStreamBytes = 24 << 20;
constexpr int64_t kJoinBytes = 2 << 10;
constexpr int64_t kLineBytes = 64;
// A sender's sizes and offsets for neighboring receivers share cache lines, so they are read together.
template <typename Index>
constexpr int kRaggedBlock = kLineBytes / sizeof(Index);

// What a rank brought, to be told from what another did.
std::string Describe(int32_t dtype, size_t item_bytes, const int64_t* dims, size_t num_dims, int64_t num_updates,
                     bool wide_index, std::string_view plane, int num_ranks) {
  std::string text = "[";
  for (size_t i = 0; i < num_dims; ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  text += "] of dtype " + std::to_string(dtype) + " (" + std::to_string(item_bytes) + " bytes)";
  if (num_updates > 0) {
    text += ", " + std::to_string(num_updates) + (num_updates > 1 ? " updates" : " update") + " a peer in " +
            (wide_index ? "int64" : "int32") + ",";
  }
  return text + " on plane '" + std::string(plane) + "' among " + std::to_string(num_ranks) + " ranks";
}

// memcpy that leaves the caches alone, but for the ends of the range.
void StreamCopy(char* target, const char* source, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(target) & (kLineBytes - 1));
  std::memcpy(target, source, head);
  int64_t i = head;
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    __m128i line[4];
    std::memcpy(line, source + i, kLineBytes);
    for (int j = 0; j < 4; ++j) _mm_stream_si128(reinterpret_cast<__m128i*>(target + i) + j, line[j]);
  }
  std::memcpy(target + i, source + i, bytes - i);
#else
  std::memcpy(target, source, bytes);
#endif
}

void FinishStreaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Exchanges two chunks. `Size` is a compile-time constant for small ones.
template <typename Size>
inline void Swap(char* a, char* b, Size size) {
  char piece_a[kLineBytes], piece_b[kLineBytes];
  int64_t i = 0;
  for (; i + kLineBytes <= size; i += kLineBytes) {
    std::memcpy(piece_a, a + i, kLineBytes);
    std::memcpy(piece_b, b + i, kLineBytes);
    std::memcpy(a + i, piece_b, kLineBytes);
    std::memcpy(b + i, piece_a, kLineBytes);
  }
  std::memcpy(piece_a, a + i, size - i);
  std::memcpy(piece_b, b + i, size - i);
  std::memcpy(a + i, piece_b, size - i);
  std::memcpy(b + i, piece_a, size - i);
}

// An all_to_all in place: chunk d of rank s and chunk s of rank d change places, for the ranks s in [begin, end).
template <typename Size>
void SwapChunks(std::vector<Seat>& seats, int begin, int end, Size chunk) {
  const int num_ranks = static_cast<int>(seats.size());
  for (int s0 = begin; s0 < end; s0 += kSourceBlock) {
    const int s1 = std::min(end, s0 + kSourceBlock);
    for (int d0 = s0; d0 < num_ranks; d0 += kTargetBlock) {
      const int d1 = std::min(num_ranks, d0 + kTargetBlock);
      for (int s = s0; s < s1; ++s) {
        char* row = seats[s].buffers.target;
        for (int d = std::max(d0, s + 1); d < d1; ++d) {
          Swap(row + d * chunk, seats[d].buffers.target + s * chunk, chunk);
        }
      }
    }
  }
}

template <int kBytes>
void TransposeChunks(std::vector<Seat>& seats, int begin, int end) {
  const int num_ranks = static_cast<int>(seats.size());
  constexpr int kTile = kBytes < 64 ? 64 / kBytes : 1;  // one cache line of each source
  for (int first = begin; first < end; first += kTile) {
    const int last = std::min(end, first + kTile);
    for (int s = 0; s < num_ranks; ++s) {
      const char* source = seats[s].buffers.source;
      for (int d = first; d < last; ++d) {
        std::memcpy(seats[d].buffers.target + int64_t{s} * kBytes, source + int64_t{d} * kBytes, kBytes);
      }
    }
  }
}

}  // namespace

const char* CollectiveName(Collective collective) {
  switch (collective) {
    case Collective::kAllToAll: return "all_to_all";
    case Collective::kAllGather: return "all_gather";
    case Collective::kPsum: return "psum";
    case Collective::kPsumScatter: return "psum_scatter";
    case Collective::kPpermute: return "ppermute";
    case Collective::kRaggedAllToAll: return "ragged_all_to_all";
  }
  return "unknown";
}

std::string DescribeRanks(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t j = i;
    while (j + 1 < ranks.size() && ranks[j + 1] == ranks[j] + 1) ++j;
    if (!text.empty()) text += ", ";
    text += std::to_string(ranks[i]);
    if (j > i) text += (j > i + 1 ? "-" : ", ") + std::to_string(ranks[j]);
    i = j + 1;
  }
  return text;
}

Exchange::Exchange(const Call& call)
    : run_id(call.run_id),
      channel_hash(std::hash<std::string_view>()(call.channel)),
      group(call.group),
      channel(call.channel),
      plane(call.plane),
      collective(call.collective),
      first_rank(call.rank),
      dtype(call.dtype),
      item_bytes(call.item_bytes),
      sum(call.sum),
      dims(call.dims, call.dims + call.num_dims),
      pairs(call.pairs, call.pairs + call.num_pairs),
      num_updates(call.num_updates),
      wide_index(call.wide_index),
      seats(call.num_ranks) {
  source_bytes_ = static_cast<int64_t>(item_bytes);
  for (int64_t dim : dims) source_bytes_ *= dim;
  if (collective == Collective::kRaggedAllToAll && dims[0] > 0) row_bytes_ = source_bytes_ / dims[0];
}

std::string Exchange::Name() const {
  return std::string("fabric.") + CollectiveName(collective) + " on channel '" + channel + "' (group " +
         std::to_string(group) + ", " + std::to_string(num_ranks()) + " ranks)";
}

bool Exchange::HasPlaceOf(const Call& call) const { return call.num_ranks == num_ranks() && call.group == group; }

bool Exchange::HasShapeOf(const Call& call) const {
  return call.collective == collective && call.dtype == dtype && call.num_dims == dims.size() &&
         std::equal(dims.begin(), dims.end(), call.dims) && call.num_updates == num_updates &&
         call.wide_index == wide_index;
}

std::unique_ptr<std::string> Exchange::Mismatch(const Call& call) const {
  const bool same_pairs = call.num_pairs == pairs.size() && std::equal(pairs.begin(), pairs.end(), call.pairs);
  if (HasPlaceOf(call) && HasShapeOf(call) && same_pairs && call.plane == plane && call.channel == channel) {
    return nullptr;
  }
  return std::make_unique<std::string>(
      Name() + ": ranks disagree: rank " + std::to_string(first_rank) + " brought " +
      Describe(dtype, item_bytes, dims.data(), dims.size(), num_updates, wide_index, plane, num_ranks()) + ", rank " +
      std::to_string(call.rank) + " brought " + CollectiveName(call.collective) + " of " +
      Describe(call.dtype, call.item_bytes, call.dims, call.num_dims, call.num_updates, call.wide_index, call.plane,
               call.num_ranks) +
      "; exchanges without data dependence need distinct channel=");
}

void Exchange::Fail(const std::string& message) {
  std::lock_guard<std::mutex> lock(error_mutex_);
  if (failed_.load()) return;
  error_ = message;
  failed_.store(true);
}

int Exchange::NumTasks(int num_threads) const {
  int64_t bytes = source_bytes_ * num_ranks();
  int units = num_ranks();
  if (collective == Collective::kAllGather) bytes *= num_ranks();
  if (collective == Collective::kPsum) units = SumBlocks(source_bytes_);
  if (bytes < kShareBytes && collective != Collective::kRaggedAllToAll) return 1;
  return std::max(1, std::min(units, num_threads * 8));
}

void Exchange::CheckTask(int task, int num_tasks) {
  if (failed_.load(std::memory_order_relaxed)) return;
  const int begin = static_cast<int>(int64_t{num_ranks()} * task / num_tasks);
  const int end = static_cast<int>(int64_t{num_ranks()} * (task + 1) / num_tasks);
  wide_index ? CheckRagged<int64_t>(begin, end) : CheckRagged<int32_t>(begin, end);
}

void Exchange::RunTask(int task, int num_tasks) {
  const int64_t units = collective == Collective::kPsum ? SumBlocks(source_bytes_) : num_ranks();
  const int begin = static_cast<int>(units * task / num_tasks);
  const int end = static_cast<int>(units * (task + 1) / num_tasks);
  switch (collective) {
    case Collective::kAllToAll: return AllToAll(begin, end);
    case Collective::kAllGather: return AllGather(begin, end);
    case Collective::kPsum: return SumToAll(sum, seats, source_bytes_, begin, end);
    case Collective::kPsumScatter: return SumToOwner(sum, seats, source_bytes_, begin, end);
    case Collective::kPpermute: return Ppermute(begin, end);
    case Collective::kRaggedAllToAll:
      return wide_index ? MoveRagged<int64_t>(begin, end) : MoveRagged<int32_t>(begin, end);
  }
}

void Exchange::AllToAll(int begin, int end) {
  const int64_t chunk = source_bytes_ / num_ranks();
  if (chunk == 0) return;
  if (seats[0].buffers.source == seats[0].buffers.target) {
    switch (chunk) {
      case 1: return SwapChunks(seats, begin, end, std::integral_constant<int64_t, 1>());
      case 2: return SwapChunks(seats, begin, end, std::integral_constant<int64_t, 2>());
      case 4: return SwapChunks(seats, begin, end, std::integral_constant<int64_t, 4>());
      case 8: return SwapChunks(seats, begin, end, std::integral_constant<int64_t, 8>());
      case 16: return SwapChunks(seats, begin, end, std::integral_constant<int64_t, 16>());
      default: return SwapChunks(seats, begin, end, chunk);
    }
  }
  switch (chunk) {
    case 1: return TransposeChunks<1>(seats, begin, end);
    case 2: return TransposeChunks<2>(seats, begin, end);
    case 4: return TransposeChunks<4>(seats, begin, end);
    case 8: return TransposeChunks<8>(seats, begin, end);
    case 16: return TransposeChunks<16>(seats, begin, end);
  }
  const bool stream = source_bytes_ * num_ranks() >= kStreamBytes;
  alignas(kLineBytes) char joined[kSourceBlock * kJoinBytes];
  for (int d0 = begin; d0 < end; d0 += kTargetBlock) {
    const int d1 = std::min(end, d0 + kTargetBlock);
    for (int s0 = 0; s0 < num_ranks(); s0 += kSourceBlock) {
      const int s1 = std::min(num_ranks(), s0 + kSourceBlock);
      for (int d = d0; d < d1; ++d) {
        char* target = seats[d].buffers.target + s0 * chunk;
        if (stream && chunk <= kJoinBytes) {
          for (int s = s0; s < s1; ++s) {
            std::memcpy(joined + (s - s0) * chunk, seats[s].buffers.source + d * chunk, chunk);
          }
          StreamCopy(target, joined, (s1 - s0) * chunk);
          continue;
        }
        for (int s = s0; s < s1; ++s, target += chunk) {
          const char* source = seats[s].buffers.source + d * chunk;
          stream ? StreamCopy(target, source, chunk) : static_cast<void>(std::memcpy(target, source, chunk));
        }
      }
    }
  }
  if (stream) FinishStreaming();
}

void Exchange::AllGather(int begin, int end) {
  const int64_t chunk = source_bytes_;
  if (chunk == 0) return;
  for (int d = begin; d < end; ++d) {
    for (int s = 0; s < num_ranks(); ++s) {
      std::memcpy(seats[d].buffers.target + s * chunk, seats[s].buffers.source, chunk);
    }
  }
}

void Exchange::Ppermute(int begin, int end) {
  // Ranks nobody sends to receive zeros, as in lax.ppermute.
  std::vector<int> source_of(num_ranks(), -1);
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) source_of[pairs[i + 1]] = static_cast<int>(pairs[i]);
  for (int d = begin; d < end; ++d) {
    const int s = source_of[d];
    if (s < 0) {
      std::memset(seats[d].buffers.target, 0, source_bytes_);
      continue;
    }
    std::memcpy(seats[d].buffers.target, seats[s].buffers.source, source_bytes_);
    traffic->Add(s, d, source_bytes_);
  }
}

// Checks what the targets in [begin, end) are to receive.
template <typename Index>
void Exchange::CheckRagged(int begin, int end) {
  constexpr int kBlock = kRaggedBlock<Index>;
  int64_t target_rows = seats[0].buffers.target_rows;
  for (const Seat& seat : seats) target_rows = std::min(target_rows, seat.buffers.target_rows);
  for (int d0 = begin; d0 < end; d0 += kBlock) {
    const int d1 = std::min(end, d0 + kBlock);
    for (int s = 0; s < num_ranks(); ++s) {
      if (IsPlainlyRight<Index>(s, d0, d1, target_rows)) continue;
      for (int d = d0; d < d1; ++d) {
        if (!CheckRaggedPair<Index>(s, d)) return;
      }
    }
  }
}

// Whether nothing that `source` sends the targets in [begin, end) can be wrong, where each has `target_rows` or more.
// Without branches: nearly every exchange is right, and this is all that its checks cost.
template <typename Index>
bool Exchange::IsPlainlyRight(int source, int begin, int end, int64_t target_rows) const {
  const Buffers& from = seats[source].buffers;
  const int64_t k = num_updates, first = begin * k, last = end * k;
  const Index* input_offsets = static_cast<const Index*>(from.index[0]);
  const Index* send_sizes = static_cast<const Index*>(from.index[1]);
  const Index* output_offsets = static_cast<const Index*>(from.index[2]);
  constexpr int64_t kMax = std::numeric_limits<Index>::max();
  const Index max_in = static_cast<Index>(std::min(dims[0], kMax));
  const Index max_out = static_cast<Index>(std::min(target_rows, kMax));
  Index wrong = 0;
  for (int64_t i = first; i < last; ++i) {
    const Index size = send_sizes[i], in = input_offsets[i], out = output_offsets[i], rows = std::max<Index>(size, 0);
    const bool is_outside = (in < 0) | (in > max_in - rows) | (out < 0) | (out > max_out - rows);
    wrong |= (size < 0) | ((size != 0) & is_outside);
  }
  for (int d = begin; d < end; ++d) {
    const Index* recv_sizes = static_cast<const Index*>(seats[d].buffers.index[3]) + source * k;
    for (int64_t j = 0; j < k; ++j) wrong |= send_sizes[d * k + j] ^ recv_sizes[j];
  }
  return wrong == 0;
}

// Whether everything that `source` sends `target` is expected there and lies inside both buffers.
template <typename Index>
bool Exchange::CheckRaggedPair(int source, int target) {
  const Buffers& from = seats[source].buffers;
  const Buffers& to = seats[target].buffers;
  const int64_t k = num_updates;
  const Index* input_offsets = static_cast<const Index*>(from.index[0]) + target * k;
  const Index* send_sizes = static_cast<const Index*>(from.index[1]) + target * k;
  const Index* output_offsets = static_cast<const Index*>(from.index[2]) + target * k;
  const Index* recv_sizes = static_cast<const Index*>(to.index[3]) + source * k;
  const int64_t source_rows = dims[0];
  for (int64_t j = 0; j < k; ++j) {
    const int64_t size = send_sizes[j];
    if (size == 0 && recv_sizes[j] == 0) continue;
    const int64_t in = input_offsets[j], out = output_offsets[j];
    const char* wrong = nullptr;
    if (size != recv_sizes[j]) {
      wrong = "send_sizes and recv_sizes disagree";
    } else if (size < 0 || in < 0 || in > source_rows - size) {
      wrong = "rows outside the sender's operand";
    } else if (out < 0 || out > to.target_rows - size) {
      wrong = "rows outside the receiver's output";
    }
    if (wrong != nullptr) {
      Fail(Name() + ": " + wrong + ": rank " + std::to_string(source) + " sends rank " + std::to_string(target) +
           " (update " + std::to_string(j) + ") " + std::to_string(size) + " rows from offset " +
           std::to_string(in) + " of " + std::to_string(source_rows) + " to offset " + std::to_string(out) + " of " +
           std::to_string(to.target_rows) + ", the receiver expects " + std::to_string(recv_sizes[j]));
      return false;
    }
  }
  return true;
}

// Copies what the targets in [begin, end) receive, once everything has been checked.
template <typename Index>
void Exchange::MoveRagged(int begin, int end) {
  constexpr int kBlock = kRaggedBlock<Index>;
  for (int d0 = begin; d0 < end; d0 += kBlock) {
    for (int s = 0; s < num_ranks(); ++s) {
      for (int d = d0; d < std::min(end, d0 + kBlock); ++d) MoveRaggedPair<Index>(s, d);
    }
  }
}

// Pieces that overlap in a receiver's buffer are copied one after the other, by sender and update, so the last of them
// stays. Callers cannot rely on it: lax leaves it undefined.
template <typename Index>
void Exchange::MoveRaggedPair(int source, int target) {
  const Buffers& from = seats[source].buffers;
  const Buffers& to = seats[target].buffers;
  const int64_t k = num_updates;
  const Index* input_offsets = static_cast<const Index*>(from.index[0]) + target * k;
  const Index* sizes = static_cast<const Index*>(from.index[1]) + target * k;
  const Index* output_offsets = static_cast<const Index*>(from.index[2]) + target * k;
  int64_t rows = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (sizes[j] == 0) continue;
    std::memcpy(to.target + output_offsets[j] * row_bytes_, from.source + input_offsets[j] * row_bytes_,
                sizes[j] * row_bytes_);
    rows += sizes[j];
  }
  if (rows > 0) traffic->Add(source, target, rows * row_bytes_);
}

template <typename Index>
int64_t Exchange::RaggedWireBytes(int rank) const {
  const Index* send_sizes = static_cast<const Index*>(seats[rank].buffers.index[1]);
  const Index* recv_sizes = static_cast<const Index*>(seats[rank].buffers.index[3]);
  int64_t sent = 0, received = 0, own = 0;
  for (int64_t i = 0; i < num_ranks() * num_updates; ++i) sent += send_sizes[i], received += recv_sizes[i];
  for (int64_t j = 0; j < num_updates; ++j) own += send_sizes[rank * num_updates + j];
  return (std::max(sent, received) - own) * row_bytes_;
}

int64_t Exchange::BytesPerPair() const {
  const int64_t ranks = num_ranks();
  switch (collective) {
    case Collective::kAllToAll:
    case Collective::kPsumScatter: return source_bytes_ / ranks;
    case Collective::kAllGather: return source_bytes_;
    // Counted as psum_scatter then all_gather, the form that moves fewest bytes.
    case Collective::kPsum: return 2 * ((source_bytes_ + ranks - 1) / ranks);
    case Collective::kPpermute:
    case Collective::kRaggedAllToAll: return -1;
  }
  return -1;
}

int64_t Exchange::WireBytes(int rank) const {
  if (collective == Collective::kPpermute) return source_bytes_;
  if (collective == Collective::kRaggedAllToAll) {
    return wide_index ? RaggedWireBytes<int64_t>(rank) : RaggedWireBytes<int32_t>(rank);
  }
  return BytesPerPair() * (num_ranks() - 1);
}

}  // namespace cmjax
