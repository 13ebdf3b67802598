// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/notification_queue.hpp>

#include <algorithm>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// What each peer finds room for, whatever others have sent.
inline constexpr std::size_t due_count = 16;
inline constexpr std::size_t due_bytes = std::size_t{128} << 10;

/// With what it takes to keep it, and to find its peer's share.
KVFERRY_INLINE std::size_t cost_of(const Notification& notification) {
  constexpr std::size_t overhead = 128;
  return notification.payload.size() + notification.peer_id.size() + overhead;
}

}  // namespace internal

struct NotificationQueue::Wait final : Expirable {
  Wait(std::weak_ptr<NotificationQueue> owner, NotificationCompletion handler)
      : queue(std::move(owner)), completion(std::move(handler)) {}

  void expire() override { end(errc::timed_out); }

  void end(std::error_code cause) {
    if (const auto owner = queue.lock()) {
      owner->end(*this, cause);
    }
  }

  std::weak_ptr<NotificationQueue> queue;
  NotificationCompletion completion;
  std::optional<Clock::time_point> deadline;
};

KVFERRY_INLINE bool NotificationQueue::has_room(const std::string& peer_id, std::size_t bytes) const {
  const auto known = shares_.find(peer_id);
  const Share own = known == shares_.end() ? Share{} : known->second;
  const auto fits = [bytes](std::size_t used, std::size_t bound) { return used <= bound && bytes <= bound - used; };
  if (!fits(own.bytes, bounds_.bytes_of_peer)) {
    return false;
  }
  const bool below_its_due =
      own.count < std::min(due_count, bounds_.count) && fits(own.bytes, std::min(due_bytes, bounds_.bytes));
  return below_its_due || (notifications_.size() < bounds_.count && fits(bytes_, bounds_.bytes));
}

KVFERRY_INLINE bool NotificationQueue::push(Notification notification) {
  std::shared_ptr<Wait> wait;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      return false;
    }
    if (waits_.empty()) {
      const std::size_t bytes = cost_of(notification);
      if (!has_room(notification.peer_id, bytes)) {
        return false;
      }
      Share& share = shares_[notification.peer_id];
      ++share.count;
      share.bytes += bytes;
      bytes_ += bytes;
      notifications_.push_back(std::move(notification));
      return true;
    }
    wait = std::move(waits_.front());
    waits_.pop_front();
  }
  if (wait->deadline) {
    deadlines_->remove(*wait->deadline, *wait);
  }
  wait->completion({}, std::move(notification));
  return true;
}

KVFERRY_INLINE void NotificationQueue::receive(std::optional<std::chrono::milliseconds> timeout, NotificationCompletion completion) {
  std::unique_lock lock(mutex_);
  if (closed_) {
    lock.unlock();
    completion(errc::closed, {});
    return;
  }
  if (!notifications_.empty()) {
    Notification first = std::move(notifications_.front());
    notifications_.pop_front();
    const std::size_t bytes = cost_of(first);
    const auto share = shares_.find(first.peer_id);
    share->second.bytes -= bytes;
    bytes_ -= bytes;
    if (--share->second.count == 0) {
      shares_.erase(share);
    }
    lock.unlock();
    completion({}, std::move(first));
    return;
  }
  auto wait = std::make_shared<Wait>(weak_from_this(), std::move(completion));
  if (timeout) {
    wait->deadline = deadline_after(*timeout);
  }
  if (wait->completion.cancellable()) {
    wait->completion.on_cancel(cancellation(deadlines_->gate(), std::weak_ptr(wait),
                                            [](Wait& pending) { pending.end(errc::cancelled); }));
  }
  waits_.push_back(wait);
  lock.unlock();
  if (!wait->deadline) {
    return;
  }
  deadlines_->add(*wait->deadline, wait);
  lock.lock();
  const bool ended = std::ranges::find(waits_, wait) == waits_.end();
  lock.unlock();
  if (ended) {
    deadlines_->remove(*wait->deadline, *wait);  // before it was added
  }
}

KVFERRY_INLINE void NotificationQueue::end(Wait& wait, std::error_code cause) {
  std::shared_ptr<Wait> ended;
  {
    const std::lock_guard lock(mutex_);
    for (auto it = waits_.begin(); it != waits_.end(); ++it) {
      if (it->get() == &wait) {
        ended = std::move(*it);
        waits_.erase(it);
        break;
      }
    }
  }
  if (ended) {
    if (ended->deadline) {
      deadlines_->remove(*ended->deadline, *ended);
    }
    ended->completion(cause, {});
  }
}

KVFERRY_INLINE std::size_t NotificationQueue::pending() const {
  const std::lock_guard lock(mutex_);
  return notifications_.size();
}

KVFERRY_INLINE void NotificationQueue::close() {
  std::list<std::shared_ptr<Wait>> waits;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    waits.swap(waits_);
  }
  for (const auto& wait : waits) {
    wait->completion(errc::closed, {});
  }
}

}  // namespace kvferry::kit
