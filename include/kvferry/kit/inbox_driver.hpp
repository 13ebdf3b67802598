// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_INBOX_DRIVER_HPP
#define KVFERRY_KIT_INBOX_DRIVER_HPP

#include <atomic>
#include <mutex>
#include <optional>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Decides which thread drives a connection. A thread with work for it leaves the work in the inbox and tries to become
/// the driver. The driver holds the engine, empties the inbox, and works until there is nothing to do. If another
/// thread drives already, it finds the work in the inbox before it stops. So no thread waits for a lock that is held
/// across a system call, and only the driver touches what the engine guards.
///
/// @tparam Inbox default-constructible, with `empty()`.
template <class Inbox>
class InboxDriver {
 public:
  template <class Put>
  void put(Put put_into) {
    const std::lock_guard lock(inbox_mutex_);
    put_into(inbox_);
    filled_.store(true, std::memory_order_relaxed);
  }

  /// By the driver, in a step: takes what has come since.
  [[nodiscard]] Inbox take() {
    // Without the lock, since this happens with each check of a connection. Work that it misses is found in the check
    // after the engine has been released.
    if (!filled_.load(std::memory_order_relaxed)) {
      return {};
    }
    const std::lock_guard lock(inbox_mutex_);
    filled_.store(false, std::memory_order_relaxed);
    return std::exchange(inbox_, Inbox());
  }

  /// Drives, unless another thread does. @param step works, with the engine held, and gets what was in the inbox, so
  /// that no step can leave it there: this thread keeps the others away until the inbox is empty. @param released gets
  /// what `step` returned, with the engine let go; @return whether to look into the inbox again.
  /// @return whether this thread drove.
  template <class Step, class Released>
  bool drive(Step step, Released released) {
    for (;;) {
      std::optional<decltype(step(Inbox()))> result;
      {
        const std::unique_lock engine(engine_mutex_, std::try_to_lock);
        if (!engine) {
          return false;  // the driver looks into the inbox once more after it has let go
        }
        result.emplace(step(take()));
      }
      if (!released(std::move(*result))) {
        return true;
      }
      const std::lock_guard lock(inbox_mutex_);
      if (inbox_.empty()) {
        return true;
      }
    }
  }

  /// Waits for the driver, then changes the guarded state. Call `drive` afterwards: threads that came meanwhile took
  /// this one for the driver and left their work in the inbox.
  template <class Change>
  void change(Change change_engine) {
    const std::lock_guard engine(engine_mutex_);
    change_engine();
  }

 private:
  std::mutex inbox_mutex_;
  Inbox inbox_;
  std::atomic<bool> filled_{false};
  std::mutex engine_mutex_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_INBOX_DRIVER_HPP
