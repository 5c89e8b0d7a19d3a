// Traffic per (plane, collective): calls, bytes from each device to each other, modelled delay. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace cmjax {

// Bytes among one list of devices. Collectives in which every pair carries the same only bump one number.
struct TrafficBlock {
  explicit TrafficBlock(std::vector<int32_t> ids) : devices(std::move(ids)) {}

  // Cells are allocated at the first irregular exchange; guarded by TrafficCounters::mutex_.
  void NeedCells() {
    if (!cells) cells.reset(new std::atomic<int64_t>[devices.size() * devices.size()]());
  }
  void Add(size_t source, size_t target, int64_t bytes) {
    cells[target * devices.size() + source].fetch_add(bytes, std::memory_order_relaxed);
  }

  const std::vector<int32_t> devices;  // device ordinal of each rank
  int64_t bytes_per_pair = 0;          // guarded by TrafficCounters::mutex_
  std::unique_ptr<std::atomic<int64_t>[]> cells;
};

struct TrafficEntry {
  std::string plane;
  int32_t collective = 0;
  int64_t calls = 0;
  double modelled_s = 0;
  double exposed_s = 0;
  std::vector<std::shared_ptr<TrafficBlock>> blocks;
};

class TrafficCounters {
 public:
  // Counts one call; `bytes_per_pair` >= 0 is added to every pair, < 0 means the caller adds cell by cell.
  std::shared_ptr<TrafficBlock> Count(const std::string& plane, int32_t collective,
                                      std::vector<int32_t> devices, int64_t bytes_per_pair) {
    std::lock_guard<std::mutex> lock(mutex_);
    TrafficEntry& entry = Entry(plane, collective);
    ++entry.calls;
    std::shared_ptr<TrafficBlock> found;
    for (auto& block : entry.blocks) {
      if (block->devices == devices) found = block;
    }
    if (!found) {
      found = std::make_shared<TrafficBlock>(std::move(devices));
      entry.blocks.push_back(found);
    }
    if (bytes_per_pair >= 0) {
      found->bytes_per_pair += bytes_per_pair;
    } else {
      found->NeedCells();
    }
    return found;
  }

  void AddDelay(const std::string& plane, int32_t collective, double modelled_s, double exposed_s) {
    std::lock_guard<std::mutex> lock(mutex_);
    TrafficEntry& entry = Entry(plane, collective);
    entry.modelled_s += modelled_s;
    entry.exposed_s += exposed_s;
  }

  // A copy; blocks whose cells are still being written are shared, and read as they are then.
  std::vector<TrafficEntry> Snapshot() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<TrafficEntry> entries;
    for (auto& item : entries_) {
      entries.push_back(item.second);
      for (auto& block : entries.back().blocks) {
        auto copy = std::make_shared<TrafficBlock>(block->devices);
        copy->bytes_per_pair = block->bytes_per_pair;
        if (block->cells) {
          copy->NeedCells();
          const size_t size = block->devices.size() * block->devices.size();
          for (size_t i = 0; i < size; ++i) copy->cells[i] = block->cells[i].load(std::memory_order_relaxed);
        }
        block = std::move(copy);
      }
    }
    return entries;
  }

  void Reset() {
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.clear();
  }

 private:
  TrafficEntry& Entry(const std::string& plane, int32_t collective) {
    TrafficEntry& entry = entries_[{plane, collective}];
    if (entry.plane.empty()) {
      entry.plane = plane;
      entry.collective = collective;
    }
    return entry;
  }

  std::mutex mutex_;
  std::map<std::pair<std::string, int32_t>, TrafficEntry> entries_;
};

}  // namespace cmjax
