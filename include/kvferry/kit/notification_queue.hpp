// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_NOTIFICATION_QUEUE_HPP
#define KVFERRY_KIT_NOTIFICATION_QUEUE_HPP

#include <chrono>
#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include <kvferry/completion.hpp>

#include <kvferry/kit/wait_queue.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Notifications on their way from peers to the channel's user. A notification waits for a call, or a call for a
/// notification.
class NotificationQueue final : public WaitQueue<Notification> {
 public:
  struct Bounds {
    std::size_t count = 0;
    std::size_t bytes = 0;
    std::size_t bytes_of_peer = 0;
    std::size_t count_of_peer = std::numeric_limits<std::size_t>::max();
  };

  NotificationQueue(std::shared_ptr<DeadlineQueue> deadlines, const Bounds& bounds)
      : WaitQueue(std::move(deadlines)), bounds_(bounds) {}

  /// @return false if the queue is full or closed: the notification isn't taken. A peer with few notifications in the
  ///   queue has room even if others have filled it.
  [[nodiscard]] bool push(Notification notification);
  /// One without a key.
  void receive(std::optional<std::chrono::milliseconds> timeout, NotificationCompletion completion);
  /// Several of a key.
  void receive(const NotificationsRequest& request, NotificationsCompletion completion);
  /// Drops a peer's notifications with keys for which no call waits. @return how many.
  std::size_t drop_unasked(const std::string& peer_id);

 private:
  /// A peer's share of the queue.
  struct Share {
    std::size_t count = 0;
    std::size_t bytes = 0;
  };

  [[nodiscard]] bool has_room(const std::string& peer_id, std::size_t bytes) const;
  [[nodiscard]] bool keep(Notification& notification) override;
  void let_go(const Notification& notification) override;

  const Bounds bounds_;
  std::map<std::string, Share> shares_;  ///< Of those that have any.
  std::size_t bytes_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_NOTIFICATION_QUEUE_HPP
