// SPDX-License-Identifier: Apache-2.0
#include "notification_queue.hpp"

#include <kvferry/error.hpp>

namespace kvferry::kit {

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

bool NotificationQueue::push(Notification notification) {
  std::shared_ptr<Wait> wait;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      return false;
    }
    if (waits_.empty()) {
      if (notifications_.size() >= limit_) {
        return false;
      }
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

void NotificationQueue::receive(std::optional<std::chrono::milliseconds> timeout, NotificationCompletion completion) {
  std::unique_lock lock(mutex_);
  if (closed_) {
    completion(errc::closed, {});
    return;
  }
  if (!notifications_.empty()) {
    Notification first = std::move(notifications_.front());
    notifications_.pop_front();
    completion({}, std::move(first));
    return;
  }
  auto wait = std::make_shared<Wait>(weak_from_this(), std::move(completion));
  if (timeout) {
    wait->deadline = deadline_after(*timeout);
  }
  if (wait->completion.cancellable()) {
    wait->completion.on_cancel([weak = std::weak_ptr(wait)](asio::cancellation_type) {
      if (const auto pending = weak.lock()) {
        pending->end(errc::cancelled);
      }
    });
  }
  waits_.push_back(wait);
  lock.unlock();
  if (wait->deadline) {
    deadlines_->add(*wait->deadline, wait);
  }
}

void NotificationQueue::end(Wait& wait, std::error_code cause) {
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

void NotificationQueue::close() {
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
