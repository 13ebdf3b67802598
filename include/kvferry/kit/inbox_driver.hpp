// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_INBOX_DRIVER_HPP
#define KVFERRY_KIT_INBOX_DRIVER_HPP

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <optional>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Decides which thread drives a connection. A thread with work for it leaves the work in the inbox and tries to become
/// the driver. The driver holds the engine, empties the inbox, and works until there is nothing to do. If another
/// thread drives already, it finds the work in the inbox before it stops. So no thread waits for a lock that is held
/// across a system call, and only the driver touches what the engine guards.
///
/// One word says both who holds the engine and whether the inbox is filled. So who lets the engine go learns in the same step
/// whether something was left meanwhile, and neither takes a lock.
///
/// @tparam Inbox default-constructible, with `empty()`.
template <class Inbox>
class InboxDriver {
 public:
  template <class Put>
  void put(Put put_into) {
    const std::lock_guard lock(inbox_mutex_);
    put_into(inbox_);
    state_.fetch_or(filled);
  }

  /// Whether there is something to `take`. What it misses is found when the engine is let go.
  [[nodiscard]] bool has_some() const noexcept { return (state_.load(std::memory_order_relaxed) & filled) != 0; }

  /// By the driver, in a step: takes what has come since.
  [[nodiscard]] Inbox take() {
    // Without the lock, since this comes with each look at a connection.
    if (!has_some()) {
      return {};
    }
    const std::lock_guard lock(inbox_mutex_);
    state_.fetch_and(~filled);
    return std::exchange(inbox_, Inbox());
  }

  /// Drives, unless another thread does. @param step works, with the engine held, and gets what was in the inbox, so
  /// that no step can leave it there: this thread keeps the others away until the inbox is empty. @param released gets
  /// what `step` returned, with the engine let go; @return whether to look into the inbox again.
  /// @return whether this thread drove.
  template <class Step, class Released>
  bool drive(Step step, Released released) {
    for (;;) {
      if ((state_.fetch_or(held) & held) != 0) {
        return false;  // the driver finds the inbox filled when it lets go
      }
      std::optional<decltype(step(Inbox()))> result;
      bool more = false;
      {
        Release release{*this, more};
        result.emplace(step(take()));
      }
      // `released` may have left something itself.
      if (!released(std::move(*result)) || (!more && !has_some())) {
        return true;
      }
    }
  }

  /// Waits for the driver, then changes what the engine guards. Call `drive` afterwards: threads that came meanwhile
  /// took this one for the driver and left their work in the inbox.
  template <class Change>
  void change(Change change_engine) {
    hold();
    bool more = false;
    const Release release{*this, more};
    change_engine();
  }

  /// @name For a thread that stays the driver for a while. It `take`s what others leave.
  /// @{

  /// Waits for the driver.
  void hold() {
    if ((state_.fetch_or(held) & held) == 0) {
      return;
    }
    std::unique_lock lock(waiting_mutex_);
    ++waiting_;
    let_go_.wait(lock, [this] { return (state_.fetch_or(held | wanted) & held) == 0; });
    if (--waiting_ == 0) {
      state_.fetch_and(~wanted);
      let_go_.notify_all();
    }
  }
  /// Whether another thread waits in `change` or `hold`.
  [[nodiscard]] bool is_wanted() const noexcept { return (state_.load(std::memory_order_relaxed) & wanted) != 0; }
  /// @return whether something was left: to be followed by `drive` then.
  [[nodiscard]] bool let_go() {
    const unsigned before = state_.fetch_and(~held);
    if ((before & wanted) != 0) {
      const std::lock_guard lock(waiting_mutex_);
      let_go_.notify_all();
    }
    return (before & filled) != 0;
  }
  /// With the engine let go: waits until those have had it who waited for it. Else the thread that has just let go would always
  /// be the first to take it again.
  void let_others_hold() {
    std::unique_lock lock(waiting_mutex_);
    let_go_.wait(lock, [this] { return waiting_ == 0; });
  }
  /// @}

 private:
  static constexpr unsigned held = 1;    ///< The engine.
  static constexpr unsigned filled = 2;  ///< The inbox.
  static constexpr unsigned wanted = 4;  ///< Somebody waits for the engine.

  struct Release {
    InboxDriver& driver;
    bool& more;
    ~Release() { more = driver.let_go(); }
  };

  std::mutex inbox_mutex_;
  Inbox inbox_;
  std::atomic<unsigned> state_{0};
  std::mutex waiting_mutex_;
  std::condition_variable let_go_;
  std::size_t waiting_ = 0;  ///< Guarded by `waiting_mutex_`.
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_INBOX_DRIVER_HPP
