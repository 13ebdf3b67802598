// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_SERVING_PLACE_HPP
#define KVFERRY_KIT_SERVING_PLACE_HPP

#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/kit/thread_rank.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The place of the one blocking call whose thread serves a link (`Link::begin_serving`).
class ServingPlace {
 public:
  explicit ServingPlace(std::shared_ptr<const IoThreadRank> others) noexcept : others_(std::move(others)) {}

  /// @return false if another thread has it, or the calling one runs later than those that serve otherwise.
  [[nodiscard]] bool take() noexcept {
    if (others_->was_above_this_thread_lately() || taken_.exchange(true)) {
      return false;
    }
    has_slept_ = false;
    thread_ = std::this_thread::get_id();
    return true;
  }
  [[nodiscard]] bool is_of_this_thread() const noexcept {
    return thread_.load(std::memory_order_relaxed) == std::this_thread::get_id();
  }

  /// @name By the thread that has it
  /// @{

  /// Before each sleep: whether it may, rather than leave the link to others because it has come to run after them. A call
  /// that sleeps once, as most, doesn't ask the system.
  [[nodiscard]] bool may_sleep() noexcept {
    return !std::exchange(has_slept_, true) || !others_->is_above_this_thread_now();
  }
  void leave() noexcept {
    thread_ = std::thread::id();
    taken_ = false;
  }
  /// @}

 private:
  const std::shared_ptr<const IoThreadRank> others_;
  std::atomic<bool> taken_{false};
  std::atomic<std::thread::id> thread_;  ///< Of nobody: it is free.
  bool has_slept_ = false;               ///< Of that thread.
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_SERVING_PLACE_HPP
