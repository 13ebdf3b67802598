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
/// @tparam Inbox default-constructible.
template <class Inbox>
class InboxDriver {
 public:
  template <class Put>
  void put(Put put_into) {
    const std::lock_guard lock(inbox_mutex_);
    put_into(inbox_);
    filled_.exchange(1, std::memory_order_acq_rel);
  }

  /// By the driver, in a step: whether there is nothing to take. Entries that it misses are found when the engine is released.
  [[nodiscard]] bool empty() const noexcept { return filled_.load(std::memory_order_relaxed) == 0; }

  /// By the driver, in a step: takes what has come since, if anything has.
  [[nodiscard]] std::optional<Inbox> take() {
    // Without the lock, since this happens with each check of a connection. Work that it misses is found in the check
    // after the engine has been released.
    if (empty()) {
      return std::nullopt;
    }
    const std::lock_guard lock(inbox_mutex_);
    filled_.store(0, std::memory_order_relaxed);
    return std::exchange(inbox_, Inbox());
  }

  /// Drives, unless another thread does. @param step works, with the engine held, and gets what was in the inbox, if
  /// anything, so that no step can leave it there: this thread keeps the others away until the inbox is empty. @param released gets
  /// what `step` returned, with the engine let go; @return whether to look into the inbox again.
  /// @return whether this thread was the driver to the end. If not, it may have been for a while.
  template <class Step, class Released>
  bool drive(Step step, Released released) {
    return drive(std::unique_lock(engine_mutex_, std::try_to_lock), step, released);
  }

  /// Waits for the driver, changes the guarded state, and drives.
  template <class Change, class Step, class Released>
  void change_and_drive(Change change_engine, Step step, Released released) {
    std::unique_lock engine(engine_mutex_);
    change_engine();
    drive(std::move(engine), step, released);
  }

  /// Waits for the driver, then changes the guarded state. Call `drive` afterwards: threads that came meanwhile took
  /// this one for the driver and left their work in the inbox.
  template <class Change>
  void change(Change change_engine) {
    const std::lock_guard engine(engine_mutex_);
    change_engine();
  }

 private:
  template <class Step, class Released>
  bool drive(std::unique_lock<std::mutex> engine, Step& step, Released& released) {
    while (engine) {
      auto result = step(take());
      engine.unlock();
      if (!released(std::move(result))) {
        return true;
      }
      // Instead of a lock, a change that changes nothing. If `put` marked the inbox before, this sees it. If it does
      // afterwards, the engine had been let go by then, and its thread gets it.
      if (filled_.fetch_or(0, std::memory_order_acq_rel) == 0) {
        return true;
      }
      engine = std::unique_lock(engine_mutex_, std::try_to_lock);
    }
    return false;  // the driver looks into the inbox once more after it has let go
  }

  std::mutex inbox_mutex_;
  Inbox inbox_;
  std::atomic<unsigned> filled_{0};
  std::mutex engine_mutex_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_INBOX_DRIVER_HPP
