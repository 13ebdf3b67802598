// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ABANDONMENT_HPP
#define KVFERRY_KIT_ABANDONMENT_HPP

#include <functional>
#include <mutex>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Tells an attempt to connect that nobody wants it any more: see `LinkHost::when_abandoned`. Thread-safe.
class Abandonment {
 public:
  /// Calls `drop` once, when the attempt is abandoned; at once if it is abandoned already. Replaces an earlier `drop`.
  void when_abandoned(std::function<void()> drop) {
    {
      const std::lock_guard lock(mutex_);
      if (!abandoned_) {
        drop_ = std::move(drop);
        return;
      }
    }
    drop();
  }

  void abandon() {
    std::function<void()> drop;
    {
      const std::lock_guard lock(mutex_);
      abandoned_ = true;
      drop.swap(drop_);
    }
    if (drop) {
      drop();
    }
  }

  /// The connection is used, and can't be abandoned any more.
  void keep() {
    const std::lock_guard lock(mutex_);
    drop_ = nullptr;
  }

 private:
  std::mutex mutex_;
  std::function<void()> drop_;
  bool abandoned_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_ABANDONMENT_HPP
