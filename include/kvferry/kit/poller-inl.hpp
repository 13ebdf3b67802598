// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/poller.hpp>

#include <algorithm>
#include <new>
#include <utility>

#include <kvferry/completion.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// With more of them, asking the kernel which have something is cheaper than looking at each.
inline constexpr std::size_t most_watched = 8;
/// Between two looks at everything else, unless something completes, whose handlers are run at once: each look costs a
/// system call, and what comes just then waits for its end.
inline constexpr std::chrono::microseconds time_between{25};

/// A connection is looked at so often before it is given up, however long it took to move what others had.
inline constexpr int least_looks = 16;

/// The poller whose thread this is.
KVFERRY_INLINE thread_local const Poller* entered = nullptr;

}  // namespace internal

KVFERRY_INLINE Poller::Poller(PollPolicy policy)
    : patience_(std::clamp<std::chrono::microseconds>(policy.spin, std::chrono::microseconds::zero(),
                                                      std::chrono::hours(1))) {
  // Who has a connection watched asks for no event of it: later there may be no memory.
  added_.reserve(most_watched);
  watched_.reserve(most_watched);
}

KVFERRY_INLINE void Poller::enter() noexcept { entered = this; }

KVFERRY_INLINE bool Poller::watch(std::shared_ptr<Pollable> pollable) {
  if (patience_ == std::chrono::nanoseconds::zero()) {
    return false;
  }
  const std::lock_guard lock(mutex_);
  if ((!looking_ && entered != this) || count_ >= most_watched) {
    return false;
  }
  added_.push_back(std::move(pollable));
  ++count_;
  any_added_.store(true, std::memory_order_release);
  return true;
}

KVFERRY_INLINE void Poller::look(const std::function<void()>& run_ready) {
  std::chrono::steady_clock::time_point last_run{};
  for (bool looks = false;; looks = true) {
    auto now = std::chrono::steady_clock::now();
    if (!looks || watched_.empty() || any_added_.load(std::memory_order_acquire)) {
      const std::lock_guard lock(mutex_);
      if (!looks && std::exchange(looking_, true)) {
        return;
      }
      for (auto& pollable : added_) {
        watched_.push_back({std::move(pollable), now, 0});
      }
      added_.clear();
      any_added_.store(false, std::memory_order_relaxed);
      if (watched_.empty()) {
        looking_ = false;
        return;
      }
    }
    if (look_once(now) || now - last_run >= time_between) {
      last_run = now;
      try {
        run_ready();
      } catch (const std::bad_alloc&) {
        detail::log_exception("between two looks at connections");  // which nobody else looks at
      }
    }
  }
}

KVFERRY_INLINE bool Poller::look_once(std::chrono::steady_clock::time_point& now) {
  bool completed = false;
  for (std::size_t i = 0; i < watched_.size();) {
    auto& [pollable, last_found, looks_since] = watched_[i];
    const auto found = pollable->poll();
    ++looks_since;
    if (found != Pollable::Found::nothing) {
      // Moving the bytes that were found may have taken longer than patience lasts.
      now = std::chrono::steady_clock::now();
      last_found = now;
      looks_since = 0;
      completed = completed || found == Pollable::Found::completed;
    }
    const bool tired = looks_since >= least_looks && now - last_found > patience_;
    if (found != Pollable::Found::released && !tired) {
      ++i;
      continue;
    }
    const auto gone = std::move(pollable);
    watched_.erase(watched_.begin() + static_cast<std::ptrdiff_t>(i));
    {
      const std::lock_guard lock(mutex_);
      --count_;
    }
    if (tired) {
      gone->rest();
    }
  }
  return completed;
}

}  // namespace kvferry::kit
