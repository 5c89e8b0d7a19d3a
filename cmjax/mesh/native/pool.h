// A few threads that run jobs cut into numbered tasks. Nothing here knows about exchanges.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace cmjax {

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    for (int i = 0; i < num_threads_; ++i) std::thread([this] { Work(); }).detach();
  }

  int num_threads() const { return num_threads_; }

  // Runs task(0) .. task(count - 1) on the pool's threads, in any order, then `then()` on the last of them.
  void Run(int count, std::function<void(int)> task, std::function<void()> then) {
    auto job = std::make_shared<Job>();
    job->count = count;
    job->left = count;
    job->task = std::move(task);
    job->then = std::move(then);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    if (count > 1) {
      ready_.notify_all();
    } else {
      ready_.notify_one();
    }
  }

 private:
  struct Job {
    int count = 0;
    int next = 0;  // guarded by mutex_
    std::atomic<int> left{0};
    std::function<void(int)> task;
    std::function<void()> then;
  };

  void Work() {
    for (;;) {
      std::shared_ptr<Job> job;
      int index;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ready_.wait(lock, [this] { return !jobs_.empty(); });
        job = jobs_.front();
        index = job->next++;
        if (job->next == job->count) jobs_.pop_front();
      }
      job->task(index);
      if (job->left.fetch_sub(1, std::memory_order_acq_rel) == 1 && job->then) job->then();
    }
  }

  const int num_threads_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::shared_ptr<Job>> jobs_;
};

}  // namespace cmjax
