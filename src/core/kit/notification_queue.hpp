// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>

#include <kvferry/completion.hpp>

#include "operation_registry.hpp"

namespace kvferry::kit {

/// Notifications on their way from peers to the channel's user: whichever of the two comes first waits.
class NotificationQueue : public std::enable_shared_from_this<NotificationQueue> {
 public:
  NotificationQueue(std::shared_ptr<DeadlineQueue> deadlines, std::size_t limit)
      : deadlines_(std::move(deadlines)), limit_(limit) {}

  /// @return false if the queue is full or closed: the notification isn't taken.
  [[nodiscard]] bool push(Notification notification);
  void receive(std::optional<std::chrono::milliseconds> timeout, NotificationCompletion completion);
  /// Ends all waits with `errc::closed`.
  void close();

 private:
  struct Wait;

  void end(Wait& wait, std::error_code cause);

  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::size_t limit_;
  std::mutex mutex_;
  std::deque<Notification> notifications_;
  std::list<std::shared_ptr<Wait>> waits_;
  bool closed_ = false;
};

}  // namespace kvferry::kit
