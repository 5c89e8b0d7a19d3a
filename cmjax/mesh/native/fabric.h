// The exchanges of every run in this process: who has arrived, who is missing, what completes when. No XLA.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <optional>
#include <queue>
#include <unordered_map>

#include "exchange.h"
#include "pool.h"
#include "traffic.h"

namespace cmjax {

// Names a started exchange, across programs too.
struct Ticket {
  int64_t run_id = 0;
  int64_t exchange_id = 0;
};

class Fabric {
 public:
  // Lives until the process ends, as its threads do.
  static Fabric& Get();

  // The rank takes part in an exchange; `done` is called, never from inside this call, once its bytes are there.
  void Enter(const Call& call, const Buffers& buffers, Completion done);
  // The two halves: Start says that the rank is there, Finish brings its memory.
  std::unique_ptr<std::string> Start(const Call& call, Ticket* ticket);
  void Finish(const Ticket& ticket, const Call& call, const Buffers& buffers, Completion done);

  // Calls `done` on another thread, soon.
  void Later(Completion done);

  void SetTimeout(double seconds);
  // Completion is held back until latency_s + bytes / bytes_per_s after the last rank's start. No plane = off.
  void SetDelay(const std::string& plane, double latency_s, double bytes_per_s);
  void ClearDelays();

  TrafficCounters& traffic() { return traffic_; }
  Pool& pool() { return pool_; }
  int num_threads() const { return pool_.num_threads(); }
  int64_t num_live();

 private:
  using ExchangePtr = std::shared_ptr<Exchange>;
  struct Key {
    int64_t run_id;
    size_t channel_hash;
    int32_t group;
    bool operator==(const Key& other) const {
      return run_id == other.run_id && channel_hash == other.channel_hash && group == other.group;
    }
  };
  struct KeyHash {
    size_t operator()(const Key& key) const {
      return key.channel_hash ^ (static_cast<size_t>(key.run_id) * 0x9e3779b97f4a7c15ull) ^
             (static_cast<size_t>(key.group) * 0xc2b2ae3d27d4eb4full);
    }
  };
  struct Run {
    Clock::time_point last_progress;
    int num_live = 0;
  };
  struct Delay {
    double latency_s;
    double bytes_per_s;
  };
  struct Held {  // promises that wait for their modelled time
    Clock::time_point due;
    ExchangePtr exchange;
    int begin, end;
    bool operator<(const Held& other) const { return due > other.due; }
  };

  Fabric();

  // Under mutex_. The exchange this rank joins next on the channel, or an error.
  ExchangePtr Join(const Call& call, bool split, std::string* error);
  void Arrive(Exchange& exchange, int rank, const Buffers& buffers, Completion done);
  void Remove(const Exchange& exchange);
  std::vector<ExchangePtr> FailRun(int64_t run_id, const std::string& message);
  const std::string* Failure(int64_t run_id) const;

  void Execute(ExchangePtr exchange);
  void Move(ExchangePtr exchange);
  void Complete(ExchangePtr exchange);
  void Hold(ExchangePtr exchange, const Delay& delay);
  int BatchOf(int count) const;
  void Fulfil(ExchangePtr exchange, int begin, int end);
  void FulfilFailed(std::vector<ExchangePtr> exchanges, std::string message);
  void CompleteWithError(Completion done, std::string message);

  void Watch();  // the clock thread: timeouts and modelled delays
  std::string TimeoutMessage(int64_t run_id, bool* waiting) const;

  Pool pool_;
  TrafficCounters traffic_;
  std::mutex mutex_;
  std::condition_variable clock_changed_;
  std::unordered_map<Key, std::deque<ExchangePtr>, KeyHash> live_;
  std::unordered_map<int64_t, ExchangePtr> by_id_;  // those with a start and not all finished
  std::map<int64_t, Run> runs_;                     // those with live exchanges
  std::map<int64_t, std::string> failed_runs_;      // the latest few
  std::map<std::string, Delay> delays_;
  std::priority_queue<Held> held_;
  double timeout_s_ = 120;
  int64_t next_id_ = 1;
};

}  // namespace cmjax
