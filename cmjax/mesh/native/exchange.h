// One exchange among ranks, and the movement of its bytes. No XLA, no locks.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "traffic.h"

namespace cmjax {

using Clock = std::chrono::steady_clock;
// Called exactly once per rank, with null or an error message.
using Completion = std::function<void(const std::string* error)>;

enum class Collective : int32_t { kAllToAll, kAllGather, kPsum, kPsumScatter, kPpermute, kRaggedAllToAll };
const char* CollectiveName(Collective collective);

// How elements are added; data movement does not look at it.
enum class Sum : int32_t { kNone, kS8, kU8, kS16, kU16, kS32, kU32, kS64, kU64, kBF16, kF16, kF32, kF64 };

// What one rank says about an exchange when it starts. All ranks must say the same, `rank` and `device` apart.
struct Call {
  int64_t run_id = 0;
  std::string_view channel;
  std::string_view plane;
  Collective collective = Collective::kAllToAll;
  int32_t group = 0;
  int32_t rank = 0;
  int32_t num_ranks = 0;
  int32_t device = 0;
  int32_t dtype = 0;  // XLA's number of the element type
  size_t item_bytes = 0;
  Sum sum = Sum::kNone;
  const int64_t* dims = nullptr;  // the operand's shape
  size_t num_dims = 0;
  const int64_t* pairs = nullptr;  // kPpermute: source, target, source, target, ...
  size_t num_pairs = 0;
  // kRaggedAllToAll only: what a rank's index arrays look like to the others.
  int64_t num_updates = 0;  // per peer
  bool wide_index = false;  // int64 instead of int32
};

// A rank's memory, valid until its Completion is called.
struct Buffers {
  const char* source = nullptr;
  char* target = nullptr;
  // kRaggedAllToAll only.
  int64_t target_rows = 0;
  const void* index[4] = {nullptr, nullptr, nullptr, nullptr};  // input_offsets, send_sizes, output_offsets, recv_sizes
};

struct Seat {
  bool started = false;
  bool arrived = false;
  int32_t device = -1;
  Buffers buffers;
  Completion done;
  Clock::time_point arrived_at;
};

struct Exchange {
  explicit Exchange(const Call& call);

  int num_ranks() const { return static_cast<int>(seats.size()); }
  int64_t source_bytes() const { return source_bytes_; }
  std::string Name() const;  // "all_to_all on channel 'x' (group 0)"
  // Whether a rank's call is by one of this exchange's ranks, as far as their number and group tell.
  bool HasPlaceOf(const Call& call) const;
  // Whether a rank's call moves the same kind of array by the same collective.
  bool HasShapeOf(const Call& call) const;

  // Null when `call` agrees with what the first rank said.
  std::unique_ptr<std::string> Mismatch(const Call& call) const;

  // Number of independent tasks the work splits into; then each of them once, from any thread.
  int NumTasks(int num_threads) const;
  // Where the ranks' numbers can be wrong, all of them are looked at before any byte moves: a failed exchange leaves
  // every buffer as it was. No RunTask before the last CheckTask, and none at all once there is an error.
  bool NeedsCheck() const { return collective == Collective::kRaggedAllToAll; }
  void CheckTask(int task, int num_tasks);
  void RunTask(int task, int num_tasks);

  // Bytes each ordered pair of ranks carries; -1 where they differ from pair to pair (cells).
  int64_t BytesPerPair() const;
  // Bytes rank sends to others or receives from others, whichever is more.
  int64_t WireBytes(int rank) const;

  void Fail(const std::string& message);  // keeps the first
  const std::string* error() const { return failed_.load() ? &error_ : nullptr; }

  int64_t id = 0;
  int64_t run_id;
  size_t channel_hash;
  int32_t group;
  std::string channel, plane;
  Collective collective;
  int32_t first_rank;  // who spoke first, for messages
  int32_t dtype;
  size_t item_bytes;
  Sum sum;
  std::vector<int64_t> dims, pairs;
  int64_t num_updates;
  bool wide_index;
  std::vector<Seat> seats;
  int num_started = 0, num_arrived = 0;
  Clock::time_point all_started;
  std::shared_ptr<TrafficBlock> traffic;

 private:
  void AllToAll(int begin, int end);
  void AllGather(int begin, int end);
  void Ppermute(int begin, int end);
  template <typename Index>
  void CheckRagged(int begin, int end);
  template <typename Index>
  bool IsPlainlyRight(int source, int begin, int end, int64_t target_rows) const;
  template <typename Index>
  bool CheckRaggedPair(int source, int target);
  template <typename Index>
  void MoveRagged(int begin, int end);
  template <typename Index>
  void MoveRaggedPair(int source, int target);
  template <typename Index>
  int64_t RaggedWireBytes(int rank) const;

  int64_t source_bytes_ = 0;
  int64_t row_bytes_ = 0;  // ragged
  mutable std::mutex error_mutex_;
  std::atomic<bool> failed_{false};
  std::string error_;
};

std::string DescribeRanks(const std::vector<int>& ranks);  // "3, 17-20"

}  // namespace cmjax
