// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/thread.hpp"

namespace kvferry::rdma {

/// Threads on which queue pairs are joined with those of peers. To make one ready, the kernel resolves the peer's address,
/// which takes up to a second where nobody answers for it; meanwhile other peers are served. Made when they are needed.
class JoinThreads {
 public:
  /// So many absent peers delay nobody else.
  static constexpr std::size_t most = 8;

  JoinThreads() = default;
  JoinThreads(const JoinThreads&) = delete;
  JoinThreads& operator=(const JoinThreads&) = delete;
  ~JoinThreads() { close(); }

  /// Runs it on one of the threads, or inside the call once this is closed, or if there can be no thread. What it throws
  /// ends the process.
  void run(std::function<void()> join) {
    {
      std::unique_lock lock(mutex_);
      if (!closed_ && has_thread_for_one_more(lock)) {
        waiting_.push_back(std::move(join));
        changed_.notify_one();
        return;
      }
    }
    join();
  }

  /// Runs what is left, and ends the threads. Not on one of them.
  void close() {
    std::vector<std::thread> ended;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      ended.swap(threads_);
    }
    changed_.notify_all();
    for (auto& thread : ended) {
      thread.join();
    }
  }

 private:
  bool has_thread_for_one_more(const std::unique_lock<std::mutex>&) {
    if (idle_ <= waiting_.size() && threads_.size() < most) {
      try {
        threads_.push_back(start_thread("kvferry-join", [this] { work(); }));
        ++idle_;
      } catch (const std::system_error&) {
        // Those that there are do it, later.
      }
    }
    return !threads_.empty();
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closed_ || !waiting_.empty(); });
      if (waiting_.empty()) {
        return;
      }
      auto join = std::move(waiting_.front());
      waiting_.pop_front();
      --idle_;
      lock.unlock();
      join();
      join = nullptr;
      lock.lock();
      ++idle_;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  std::vector<std::thread> threads_;
  std::size_t idle_ = 0;  ///< Threads that run nothing, those that are starting included.
  bool closed_ = false;
};

}  // namespace kvferry::rdma
