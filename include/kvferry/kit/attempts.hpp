// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ATTEMPTS_HPP
#define KVFERRY_KIT_ATTEMPTS_HPP

#include <memory>
#include <mutex>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Attempts to connect that are under way, so that closing can end them.
template <class Attempt>
class Attempts {
 public:
  /// @return false if the channel is closed.
  [[nodiscard]] bool add(const std::shared_ptr<Attempt>& attempt) {
    const std::lock_guard lock(mutex_);
    std::erase_if(attempts_, [](const auto& weak) { return weak.expired(); });
    attempts_.push_back(attempt);
    return !closed_;
  }

  [[nodiscard]] bool closed() {
    const std::lock_guard lock(mutex_);
    return closed_;
  }

  /// Calls `function` with each attempt that still exists, in any state.
  template <class Function>
  void for_each(Function function) {
    std::vector<std::weak_ptr<Attempt>> attempts;
    {
      const std::lock_guard lock(mutex_);
      attempts = attempts_;
    }
    for (const auto& weak : attempts) {
      if (const auto attempt = weak.lock()) {
        function(*attempt);
      }
    }
  }

  /// @param end ends an attempt, in any state.
  template <class End>
  void close(End end) {
    std::vector<std::weak_ptr<Attempt>> attempts;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      attempts.swap(attempts_);
    }
    for (const auto& weak : attempts) {
      if (const auto attempt = weak.lock()) {
        end(*attempt);
      }
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<Attempt>> attempts_;
  bool closed_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_ATTEMPTS_HPP
