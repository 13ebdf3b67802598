// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Transfers each of which is started again as soon as it is done, until it fails: there is always something in the
/// middle.
///
/// Keeps itself alive while anything is pending. The channel must outlive the storm.
class Storm : public std::enable_shared_from_this<Storm> {
 public:
  explicit Storm(BaseTransferChannel& channel) : channel_(channel) {}

  void add(TransferRequest request) {
    std::size_t slot = 0;
    {
      const std::lock_guard lock(mutex_);
      slot = slots_.size();
      slots_.push_back({std::move(request), {}, false});
    }
    start(slot);
  }

  /// Waits until so many transfers are done.
  bool wait_done(std::size_t count, std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [&] { return done_ >= count; });
  }

  /// Waits until each has failed. @return why; nothing if it takes too long.
  std::vector<std::error_code> wait_failed(std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    const bool all = changed_.wait_for(lock, limit, [&] { return pending_ == 0; });
    std::vector<std::error_code> errors;
    for (const Slot& slot : slots_) {
      errors.push_back(slot.error);
    }
    return all ? errors : std::vector<std::error_code>{};
  }

  /// How many handlers were called for operations that had ended already.
  [[nodiscard]] std::size_t surplus() const {
    const std::lock_guard lock(mutex_);
    return surplus_;
  }

 private:
  struct Slot {
    TransferRequest request;
    std::error_code error;
    bool running;
  };

  void start(std::size_t number) {
    TransferRequest request;
    {
      const std::lock_guard lock(mutex_);
      slots_[number].running = true;
      request = slots_[number].request;
      ++pending_;
    }
    channel_.async_transfer(
        std::move(request),
        [self = shared_from_this(), number](std::error_code error, std::size_t) { self->ended(number, error); });
  }

  void ended(std::size_t number, std::error_code error) {
    {
      const std::lock_guard lock(mutex_);
      Slot& slot = slots_[number];
      if (!std::exchange(slot.running, false)) {
        ++surplus_;
        return;
      }
      slot.error = error;
      done_ += error ? 0U : 1U;
      if (error) {
        --pending_;
      }
      changed_.notify_all();
    }
    if (!error) {
      start(number);
      const std::lock_guard lock(mutex_);
      --pending_;
    }
  }

  BaseTransferChannel& channel_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Slot> slots_;
  std::size_t pending_ = 0;
  std::size_t done_ = 0;
  std::size_t surplus_ = 0;
};

}  // namespace kvferry::testing
