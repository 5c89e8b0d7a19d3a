#include "fabric.h"

#include <algorithm>
#include <cstdio>

namespace cmjax {
namespace {

constexpr size_t kMaxFailedRuns = 256;
constexpr int kMostInBatch = 16;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

Clock::duration Duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace

Fabric& Fabric::Get() {
  static Fabric* fabric = new Fabric();
  return *fabric;
}

Fabric::Fabric() : pool_(static_cast<int>(std::thread::hardware_concurrency())) {
  std::thread([this] { Watch(); }).detach();
}

void Fabric::Enter(const Call& call, const Buffers& buffers, Completion done) {
  std::string error;
  ExchangePtr exchange;
  std::vector<ExchangePtr> failed;
  bool complete = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    exchange = Join(call, /*split=*/false, &error);
    if (exchange) {
      Arrive(*exchange, call.rank, buffers, std::move(done));
      complete = exchange->num_arrived == exchange->num_ranks();
    } else {
      failed = FailRun(call.run_id, error);
    }
  }
  if (!exchange) {
    FulfilFailed(std::move(failed), error);
    CompleteWithError(std::move(done), error);
  } else if (complete) {
    Execute(std::move(exchange));
  }
}

std::unique_ptr<std::string> Fabric::Start(const Call& call, Ticket* ticket) {
  std::string error;
  std::vector<ExchangePtr> failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ExchangePtr exchange = Join(call, /*split=*/true, &error)) {
      by_id_[exchange->id] = exchange;
      *ticket = {call.run_id, exchange->id};
      return nullptr;
    }
    failed = FailRun(call.run_id, error);
  }
  FulfilFailed(std::move(failed), error);
  return std::make_unique<std::string>(error);
}

void Fabric::Finish(const Ticket& ticket, const Call& call, const Buffers& buffers, Completion done) {
  std::string error;
  ExchangePtr exchange;
  std::vector<ExchangePtr> failed;
  bool complete = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_id_.find(ticket.exchange_id);
    if (found != by_id_.end()) {
      exchange = found->second;
      const auto who = [&] { return exchange->Name() + ": rank " + std::to_string(call.rank); };
      // A ticket is data and may be another exchange's: only the place says that `call.rank` is a seat of this one.
      const Seat* seat = exchange->HasPlaceOf(call) ? &exchange->seats[call.rank] : nullptr;
      if (!seat) {
        error = who() + " finished what it had not started: it is one of " + std::to_string(call.num_ranks) +
                " ranks of group " + std::to_string(call.group);
        failed = FailRun(ticket.run_id, error);
        exchange = nullptr;
      } else if (!seat->started || seat->arrived) {
        error = who() + (seat->arrived ? " finished twice: use each token once" : " finished without having started");
        exchange = nullptr;
      } else if (!exchange->HasShapeOf(call)) {
        // Sizes come from the start, pointers from here: another array would be read or written outside its bounds.
        error = who() + " finished with an array of another shape or dtype than it started with";
        failed = FailRun(ticket.run_id, error);
        exchange = nullptr;
      } else {
        Arrive(*exchange, call.rank, buffers, std::move(done));
        complete = exchange->num_arrived == exchange->num_ranks();
      }
    } else if (const std::string* failure = Failure(ticket.run_id)) {
      error = *failure;
    } else {
      error = std::string("fabric.") + CollectiveName(call.collective) +
              "_done: no exchange was started under this token (rank " + std::to_string(call.rank) +
              "); use each token once";
    }
  }
  if (!exchange) {
    FulfilFailed(std::move(failed), error);
    CompleteWithError(std::move(done), error);
  } else if (complete) {
    Execute(std::move(exchange));
  }
}

Fabric::ExchangePtr Fabric::Join(const Call& call, bool split, std::string* error) {
  if (const std::string* failure = Failure(call.run_id)) {
    *error = *failure;
    return nullptr;
  }
  const Key key{call.run_id, std::hash<std::string_view>()(call.channel), call.group};
  auto& queue = live_[key];
  ExchangePtr exchange;
  for (auto& candidate : queue) {
    // A mismatch comes first: it explains more than a double entry does.
    if (auto mismatch = candidate->Mismatch(call)) {
      *error = std::move(*mismatch);
      return nullptr;
    }
    Seat& seat = candidate->seats[call.rank];
    if (seat.arrived && !split) {
      *error = candidate->Name() + ": rank " + std::to_string(call.rank) +
               " entered again before its last exchange was complete; two calls without data dependence need "
               "distinct channel=";
      return nullptr;
    }
    if (!seat.started && !exchange) exchange = candidate;
  }
  Run& run = runs_[call.run_id];
  run.last_progress = Clock::now();
  if (!exchange) {
    exchange = std::make_shared<Exchange>(call);
    exchange->id = next_id_++;
    queue.push_back(exchange);
    ++run.num_live;
  }
  Seat& seat = exchange->seats[call.rank];
  seat.started = true;
  seat.device = call.device;
  if (++exchange->num_started == exchange->num_ranks()) exchange->all_started = run.last_progress;
  return exchange;
}

void Fabric::Arrive(Exchange& exchange, int rank, const Buffers& buffers, Completion done) {
  Seat& seat = exchange.seats[rank];
  seat.arrived = true;
  seat.buffers = buffers;
  seat.done = std::move(done);
  seat.arrived_at = Clock::now();
  Run& run = runs_[exchange.run_id];
  run.last_progress = seat.arrived_at;
  if (++exchange.num_arrived == exchange.num_ranks()) Remove(exchange);
}

void Fabric::Remove(const Exchange& exchange) {
  const int64_t id = exchange.id, run_id = exchange.run_id;
  auto queue = live_.find(Key{run_id, exchange.channel_hash, exchange.group});
  auto& items = queue->second;
  items.erase(std::find_if(items.begin(), items.end(), [id](const ExchangePtr& item) { return item->id == id; }));
  if (items.empty()) live_.erase(queue);
  by_id_.erase(id);
  auto run = runs_.find(run_id);
  if (--run->second.num_live == 0) runs_.erase(run);
}

std::vector<Fabric::ExchangePtr> Fabric::FailRun(int64_t run_id, const std::string& message) {
  std::vector<ExchangePtr> failed;
  for (auto item = live_.begin(); item != live_.end();) {
    if (item->first.run_id != run_id) {
      ++item;
      continue;
    }
    for (auto& exchange : item->second) {
      by_id_.erase(exchange->id);
      failed.push_back(exchange);
    }
    item = live_.erase(item);
  }
  runs_.erase(run_id);
  failed_runs_.emplace(run_id, message);
  if (failed_runs_.size() > kMaxFailedRuns) failed_runs_.erase(failed_runs_.begin());
  return failed;
}

const std::string* Fabric::Failure(int64_t run_id) const {
  auto found = failed_runs_.find(run_id);
  return found == failed_runs_.end() ? nullptr : &found->second;
}

void Fabric::Execute(ExchangePtr exchange) {
  if (!exchange->NeedsCheck()) {
    Move(std::move(exchange));
    return;
  }
  // Two jobs, one begun by the last task of the other: a barrier between the phases at which no thread waits.
  const int num_tasks = exchange->NumTasks(pool_.num_threads());
  Exchange* raw = exchange.get();
  pool_.Run(
      num_tasks, [raw, num_tasks](int task) { raw->CheckTask(task, num_tasks); },
      [this, exchange = std::move(exchange)] { exchange->error() ? Complete(exchange) : Move(exchange); });
}

void Fabric::Move(ExchangePtr exchange) {
  std::vector<int32_t> devices;
  devices.reserve(exchange->seats.size());
  for (const Seat& seat : exchange->seats) devices.push_back(seat.device);
  exchange->traffic = traffic_.Count(exchange->plane, static_cast<int32_t>(exchange->collective), std::move(devices),
                                   exchange->BytesPerPair());
  const int num_tasks = exchange->NumTasks(pool_.num_threads());
  Exchange* raw = exchange.get();
  pool_.Run(
      num_tasks, [raw, num_tasks](int task) { raw->RunTask(task, num_tasks); },
      [this, exchange = std::move(exchange)] { Complete(exchange); });
}

// All bytes are there (or an error is): fulfils the promises, now or when their modelled time has come.
void Fabric::Complete(ExchangePtr exchange) {
  const int num_ranks = exchange->num_ranks();
  if (const std::string* error = exchange->error()) {
    std::vector<ExchangePtr> others;  // of the same run: their missing ranks will not come
    {
      std::lock_guard<std::mutex> lock(mutex_);
      others = FailRun(exchange->run_id, *error);
    }
    FulfilFailed(std::move(others), *error);
  } else {
    std::optional<Delay> delay;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = delays_.find(exchange->plane);
      if (found != delays_.end()) delay = found->second;
    }
    if (delay) {
      Hold(std::move(exchange), *delay);
      return;
    }
  }
  const int size = BatchOf(num_ranks);
  pool_.Run(
      (num_ranks + size - 1) / size,
      [this, exchange, num_ranks, size](int batch) {
        Fulfil(exchange, batch * size, std::min(num_ranks, (batch + 1) * size));
      },
      nullptr);
}

// A promise fulfilled goes on with its device's program on the same thread, up to the next exchange: a few batches a
// thread, so that few devices use all threads.
int Fabric::BatchOf(int count) const { return std::clamp(count / (4 * pool_.num_threads()), 1, kMostInBatch); }

// The promises wait for their modelled time, which the clock thread sees to.
void Fabric::Hold(ExchangePtr exchange, const Delay& delay) {
  Clock::time_point all_arrived = exchange->all_started;
  for (const Seat& seat : exchange->seats) all_arrived = std::max(all_arrived, seat.arrived_at);
  double modelled_s = 0, exposed_s = 0;
  std::vector<Held> held;
  for (int rank = 0; rank < exchange->num_ranks(); ++rank) {
    const double seconds = delay.latency_s + exchange->WireBytes(rank) / delay.bytes_per_s;
    const auto due = exchange->all_started + Duration(seconds);
    modelled_s = std::max(modelled_s, Seconds(due - exchange->all_started));
    exposed_s = std::max(exposed_s, Seconds(due - all_arrived));
    held.push_back({due, exchange, rank, rank + 1});
  }
  traffic_.AddDelay(exchange->plane, static_cast<int32_t>(exchange->collective), modelled_s, exposed_s);
  std::lock_guard<std::mutex> lock(mutex_);
  for (Held& one : held) held_.push(std::move(one));
  clock_changed_.notify_one();
}

void Fabric::Fulfil(ExchangePtr exchange, int begin, int end) {
  for (int rank = begin; rank < end; ++rank) exchange->seats[rank].done(exchange->error());
}

void Fabric::FulfilFailed(std::vector<ExchangePtr> exchanges, std::string message) {
  if (exchanges.empty()) return;
  pool_.Run(
      1,
      [exchanges = std::move(exchanges), message = std::move(message)](int) {
        for (auto& exchange : exchanges) {
          for (Seat& seat : exchange->seats) {
            if (seat.arrived) seat.done(&message);
          }
        }
      },
      nullptr);
}

void Fabric::CompleteWithError(Completion done, std::string message) {
  pool_.Run(
      1, [done = std::move(done), message = std::move(message)](int) { done(&message); }, nullptr);
}

void Fabric::Later(Completion done) {
  pool_.Run(1, [done = std::move(done)](int) { done(nullptr); }, nullptr);
}

void Fabric::SetTimeout(double seconds) {
  std::lock_guard<std::mutex> lock(mutex_);
  timeout_s_ = seconds;
  clock_changed_.notify_one();
}

void Fabric::SetDelay(const std::string& plane, double latency_s, double bytes_per_s) {
  std::lock_guard<std::mutex> lock(mutex_);
  delays_[plane] = {latency_s, bytes_per_s};
}

void Fabric::ClearDelays() {
  std::lock_guard<std::mutex> lock(mutex_);
  delays_.clear();
}

int64_t Fabric::num_live() {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t count = 0;
  for (auto& item : live_) count += static_cast<int64_t>(item.second.size());
  return count;
}

// What the ranks of a silent run wait for. `waiting` is false when only orphaned starts are left.
std::string Fabric::TimeoutMessage(int64_t run_id, bool* waiting) const {
  const Exchange* oldest = nullptr;
  for (auto& item : live_) {
    if (item.first.run_id != run_id) continue;
    for (auto& exchange : item.second) {
      if (exchange->num_arrived > 0 && (!oldest || exchange->id < oldest->id)) oldest = exchange.get();
    }
  }
  *waiting = oldest != nullptr;
  if (!oldest) return "";
  std::vector<int> missing;
  for (int rank = 0; rank < oldest->num_ranks(); ++rank) {
    if (!oldest->seats[rank].arrived) missing.push_back(rank);
  }
  char timeout[32];
  std::snprintf(timeout, sizeof(timeout), "%g", timeout_s_);
  return oldest->Name() + " gave up after " + timeout + " s without progress: " +
         std::to_string(oldest->num_arrived) + " ranks arrived, missing ranks: " + DescribeRanks(missing);
}

void Fabric::Watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    const auto now = Clock::now();
    auto wake = now + Duration(std::min(1.0, std::max(0.01, timeout_s_ / 8)));
    std::vector<Held> due;
    while (!held_.empty() && held_.top().due <= now) {
      due.push_back(held_.top());
      held_.pop();
    }
    if (!held_.empty()) wake = std::min(wake, held_.top().due);

    std::vector<int64_t> silent;
    for (auto& run : runs_) {
      if (now - run.second.last_progress > Duration(timeout_s_)) silent.push_back(run.first);
    }
    std::vector<std::pair<std::vector<ExchangePtr>, std::string>> failed;
    for (int64_t run_id : silent) {
      bool waiting = false;
      std::string message = TimeoutMessage(run_id, &waiting);
      auto exchanges = FailRun(run_id, message);
      if (!waiting) {
        failed_runs_.erase(run_id);
      } else {
        failed.emplace_back(std::move(exchanges), std::move(message));
      }
    }
    if (due.empty() && failed.empty()) {
      clock_changed_.wait_until(lock, wake);
      continue;
    }
    lock.unlock();
    for (auto& item : failed) FulfilFailed(std::move(item.first), std::move(item.second));
    if (!due.empty()) {
      const int count = static_cast<int>(due.size());
      auto shared = std::make_shared<std::vector<Held>>(std::move(due));
      const int size = BatchOf(count);
      pool_.Run(
          (count + size - 1) / size,
          [this, shared, count, size](int batch) {
            for (int i = batch * size; i < std::min(count, (batch + 1) * size); ++i) {
              Fulfil((*shared)[i].exchange, (*shared)[i].begin, (*shared)[i].end);
            }
          },
          nullptr);
    }
    lock.lock();
  }
}

}  // namespace cmjax
