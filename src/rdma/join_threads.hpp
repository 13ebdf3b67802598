// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/kit/side_message_queue.hpp>
#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Threads that join queue pairs with those of peers. To make one ready, the kernel resolves the peer's address, which
/// takes up to a second if nobody answers; meanwhile other peers are served. Threads are made when they are needed.
class JoinThreads {
 public:
  /// The number of absent peers that delay no other peer.
  static constexpr std::size_t most = 8;

  /// @param bounds limit the work that waits for strangers.
  explicit JoinThreads(const kit::SideMessageQueue::Bounds& bounds) : of_strangers_(bounds) {}
  JoinThreads(const JoinThreads&) = delete;
  JoinThreads& operator=(const JoinThreads&) = delete;
  ~JoinThreads() { close(); }

  /// Runs `join` on one of the threads; inside the call if this is closed or there can be no thread. An exception of
  /// `join` ends the process.
  void run(std::function<void()> join) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_ && has_thread_for_one_more()) {
        waiting_.push_back(std::move(join));
        ++count_;
        changed_.notify_one();
        return;
      }
    }
    join();
  }

  /// The same, on behalf of somebody at `source`: sources take turns.
  /// @param bytes that `join` takes up while it waits. @return false if there is no room for it, of the source's or in all.
  [[nodiscard]] bool run_for(const std::string& source, std::size_t bytes, std::function<void()> join) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_ && has_thread_for_one_more()) {
        if (!of_strangers_.push(source, bytes, join)) {
          return false;
        }
        ++count_;
        changed_.notify_one();
        return true;
      }
    }
    join();
    return true;
  }

  /// Runs the remaining work, and ends the threads. Don't call it on one of them.
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
  bool has_thread_for_one_more() {
    if (idle_ <= count_ && threads_.size() < most) {
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
      changed_.wait(lock, [this] { return closed_ || count_ != 0; });
      if (count_ == 0) {
        return;
      }
      auto join = next();
      --count_;
      --idle_;
      lock.unlock();
      join();
      join = nullptr;
      lock.lock();
      ++idle_;
    }
  }

  /// This side's own and strangers' in turn, if there are both.
  std::function<void()> next() {
    own_next_ = !own_next_;
    if (waiting_.empty() || (!own_next_ && count_ != waiting_.size())) {
      return of_strangers_.pop();
    }
    auto join = std::move(waiting_.front());
    waiting_.pop_front();
    return join;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;  ///< For this side's own connects.
  kit::SideMessageQueue of_strangers_;
  std::size_t count_ = 0;  ///< In both.
  bool own_next_ = false;
  std::vector<std::thread> threads_;
  std::size_t idle_ = 0;  ///< Threads that run nothing, those that are starting included.
  bool closed_ = false;
};

}  // namespace kvferry::rdma
