// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_NOTIFICATION_QUEUE_HPP
#define KVFERRY_KIT_NOTIFICATION_QUEUE_HPP

#include <chrono>
#include <cstddef>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <kvferry/completion.hpp>

#include <kvferry/kit/operation_registry.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Notifications on their way from peers to the channel's user: whichever of the two comes first waits.
class NotificationQueue : public std::enable_shared_from_this<NotificationQueue> {
 public:
  struct Bounds {
    std::size_t count = 0;
    std::size_t bytes = 0;
    std::size_t bytes_of_peer = 0;
  };

  NotificationQueue(std::shared_ptr<DeadlineQueue> deadlines, const Bounds& bounds)
      : deadlines_(std::move(deadlines)), bounds_(bounds) {}

  /// @return false if the queue is full or closed: the notification isn't taken. A peer that has few in it finds room even
  /// where others have filled it.
  [[nodiscard]] bool push(Notification notification);
  void receive(std::optional<std::chrono::milliseconds> timeout, NotificationCompletion completion);
  [[nodiscard]] std::size_t pending() const;
  /// Ends all waits with `errc::closed`.
  void close();

 private:
  struct Wait;
  /// What a peer has in the queue.
  struct Share {
    std::size_t count = 0;
    std::size_t bytes = 0;
  };

  [[nodiscard]] bool has_room(const std::string& peer_id, std::size_t bytes) const;
  void end(Wait& wait, std::error_code cause);

  const std::shared_ptr<DeadlineQueue> deadlines_;
  const Bounds bounds_;
  mutable std::mutex mutex_;
  std::map<std::string, Share> shares_;  ///< Of those that have any.
  std::size_t bytes_ = 0;
  std::deque<Notification> notifications_;
  std::list<std::shared_ptr<Wait>> waits_;
  bool closed_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_NOTIFICATION_QUEUE_HPP
