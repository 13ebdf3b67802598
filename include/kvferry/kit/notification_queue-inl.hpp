// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/notification_queue.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Each peer's reserved share, whatever others have sent.
inline constexpr std::size_t due_count = 16;
inline constexpr std::size_t due_bytes = std::size_t{128} << 10;

/// With what it takes to keep it, and to find its peer's share. Each may have a key of its own, and that key's box with it.
KVFERRY_INLINE std::size_t cost_of(const Notification& notification) {
  constexpr std::size_t overhead = 128;
  constexpr std::size_t box = 640;
  return notification.payload.size() + notification.peer_id.size() + overhead + (notification.key == 0 ? 0 : box);
}

}  // namespace internal

KVFERRY_INLINE bool NotificationQueue::has_room(const std::string& peer_id, std::size_t bytes) const {
  const auto known = shares_.find(peer_id);
  const Share own = known == shares_.end() ? Share{} : known->second;
  const auto fits = [bytes](std::size_t used, std::size_t bound) { return used <= bound && bytes <= bound - used; };
  if (own.count >= bounds_.count_of_peer || !fits(own.bytes, bounds_.bytes_of_peer)) {
    return false;
  }
  const bool below_its_due =
      own.count < std::min(due_count, bounds_.count) && fits(own.bytes, std::min(due_bytes, bounds_.bytes));
  return below_its_due || (count() < bounds_.count && fits(bytes_, bounds_.bytes));
}

KVFERRY_INLINE bool NotificationQueue::push(Notification notification) {
  const std::uint64_t key = notification.key;
  return push_item(key, std::move(notification));
}

KVFERRY_INLINE void NotificationQueue::receive(std::optional<std::chrono::milliseconds> timeout,
                                               NotificationCompletion completion) {
  WaitQueue::receive(0, 1, timeout, for_one<Notification>(std::move(completion)));
}

KVFERRY_INLINE void NotificationQueue::receive(const NotificationsRequest& request,
                                               NotificationsCompletion completion) {
  if (request.count > bounds_.count) {
    completion(std::make_error_code(std::errc::argument_list_too_long), {});
    return;
  }
  WaitQueue::receive(request.key, request.count, request.timeout, std::move(completion));
}

KVFERRY_INLINE std::size_t NotificationQueue::drop_unasked(const std::string& peer_id) {
  return drop_unasked_if([&](const Notification& waiting) { return waiting.peer_id == peer_id; });
}

KVFERRY_INLINE bool NotificationQueue::keep(Notification& notification) {
  const std::size_t bytes = cost_of(notification);
  if (!has_room(notification.peer_id, bytes)) {
    return false;
  }
  Share& share = shares_[notification.peer_id];
  ++share.count;
  share.bytes += bytes;
  bytes_ += bytes;
  return true;
}

KVFERRY_INLINE void NotificationQueue::let_go(const Notification& notification) {
  const std::size_t bytes = cost_of(notification);
  const auto share = shares_.find(notification.peer_id);
  share->second.bytes -= bytes;
  bytes_ -= bytes;
  if (--share->second.count == 0) {
    shares_.erase(share);
  }
}

}  // namespace kvferry::kit
