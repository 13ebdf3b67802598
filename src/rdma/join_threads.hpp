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
/// takes up to a second if nobody answers; meanwhile other peers are served. They are made when they are needed.
class JoinThreads {
 public:
  /// The number of absent peers that delay no other peer.
  static constexpr std::size_t most = 8;

  /// @param bounds limit the work that waits for strangers.
  explicit JoinThreads(const kit::SideMessageQueue::Bounds& bounds) : of_strangers_(bounds) {
    threads_.reserve(most);  // a thread that runs already, and has no place here, would end the process
  }
  JoinThreads(const JoinThreads&) = delete;
  JoinThreads& operator=(const JoinThreads&) = delete;
  ~JoinThreads() { close(); }

  /// Runs `join` on one of the threads; inside the call if this is closed or there can be no thread. An exception of
  /// `join` ends the process.
  void run(std::function<void()> join) { run_from(own_, std::move(join)); }

  /// As `run`, for the rest of the work of an ended link: this side's own connects don't wait behind it.
  void run_after_end(std::function<void()> what) { run_from(of_ended_, std::move(what)); }

  /// The same, on behalf of somebody at `source`: sources take turns.
  /// @param bytes that `join` takes up while it waits. @return false if there is no room for it, of the source's or in all.
  [[nodiscard]] bool run_for(const std::string& source, std::size_t bytes, std::function<void()> join) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_ && has_thread_for_one_more()) {
        if (!of_strangers_.push(source, bytes, join)) {
          return false;
        }
        ++count_of_strangers_;
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
  using Waiting = std::deque<std::function<void()>>;

  void run_from(Waiting& queue, std::function<void()> what) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_ && has_thread_for_one_more()) {
        queue.push_back(std::move(what));
        changed_.notify_one();
        return;
      }
    }
    what();
  }

  [[nodiscard]] std::size_t count() const { return own_.size() + of_ended_.size() + count_of_strangers_; }

  bool has_thread_for_one_more() {
    if (idle_ <= count() && threads_.size() < most) {
      try {
        threads_.push_back(start_thread("kvferry-join", [this] { work(); }));
        ++idle_;
      } catch (const std::system_error&) {
        // The present threads do it, later.
      }
    }
    return !threads_.empty();
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closed_ || count() != 0; });
      if (count() == 0) {
        return;
      }
      auto next = take_next();
      --idle_;
      lock.unlock();
      next();
      next = nullptr;
      lock.lock();
      ++idle_;
    }
  }

  /// This side's own connects, strangers', and what ended links have left to do, in turn. There is something.
  std::function<void()> take_next() {
    for (;;) {
      turn_ = (turn_ + 1) % 3;
      Waiting& queue = turn_ == 0 ? own_ : of_ended_;
      if (turn_ != 1 && !queue.empty()) {
        auto next = std::move(queue.front());
        queue.pop_front();
        return next;
      }
      if (turn_ == 1 && count_of_strangers_ != 0) {
        --count_of_strangers_;
        return of_strangers_.pop();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  Waiting own_;  ///< Connects of this side's.
  Waiting of_ended_;
  kit::SideMessageQueue of_strangers_;
  std::size_t count_of_strangers_ = 0;
  unsigned turn_ = 0;
  std::vector<std::thread> threads_;
  std::size_t idle_ = 0;  ///< Threads that run nothing, those that are starting included.
  bool closed_ = false;
};

}  // namespace kvferry::rdma
