// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/operation_registry.hpp>

#include <algorithm>
#include <new>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void DeadlineQueue::add(Clock::time_point deadline, std::shared_ptr<Expirable> entry) {
  const std::lock_guard lock(mutex_);
  if (closed_) {
    return;
  }
  entries_.emplace(deadline, std::move(entry));
  if (!armed_ || deadline < *armed_) {
    arm(deadline);
  }
}

KVFERRY_INLINE void DeadlineQueue::remove(Clock::time_point deadline, const Expirable& entry) {
  std::shared_ptr<Expirable> removed;  // destroyed after the lock is released
  const std::lock_guard lock(mutex_);
  const auto [first, last] = entries_.equal_range(deadline);
  for (auto it = first; it != last; ++it) {
    if (it->second.get() == &entry) {
      removed = std::move(it->second);
      entries_.erase(it);
      return;
    }
  }
}

KVFERRY_INLINE void DeadlineQueue::close() {
  decltype(entries_) dropped;
  const std::lock_guard lock(mutex_);
  closed_ = true;
  dropped.swap(entries_);
  others_.clear();
  timer_.reset();
}

KVFERRY_INLINE void DeadlineQueue::add(std::weak_ptr<Others> others) {
  const std::lock_guard lock(mutex_);
  std::erase_if(others_, [](const auto& known) { return known.expired(); });
  others_.push_back(std::move(others));
}

KVFERRY_INLINE std::shared_ptr<DeadlineQueue::Others> DeadlineQueue::next_of_others(std::size_t& index) const {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Others> found;
  while (!found && index < others_.size()) {
    found = others_[index++].lock();
  }
  return found;
}

KVFERRY_INLINE void DeadlineQueue::arm_for(Clock::time_point deadline) {
  const std::lock_guard lock(mutex_);
  if (!closed_ && (!armed_ || deadline < *armed_)) {
    arm(deadline);
  }
}

KVFERRY_INLINE void DeadlineQueue::disarm() {
  armed_.reset();
  armed_for_ = never;
}

KVFERRY_INLINE void DeadlineQueue::arm(Clock::time_point deadline) {
  disarm();  // what follows may throw
  timer_->expires_at(deadline);
  timer_->async_wait([weak = weak_from_this()](std::error_code ec) {
    // Re-armed for an earlier deadline, or closed.
    if (ec == asio::error::operation_aborted) {
      return;
    }
    if (auto self = weak.lock()) {
      self->on_timer();
    }
  });
  armed_ = deadline;
  armed_for_ = deadline.time_since_epoch().count();
}

KVFERRY_INLINE void DeadlineQueue::on_timer() {
  decltype(entries_) expired;
  const auto arm_next = [this] {
    try {
      if (!closed_ && !armed_ && !entries_.empty()) {
        arm(entries_.begin()->first);
      }
    } catch (const std::bad_alloc&) {
      detail::log_exception("when the next deadline was set");  // the next entry sets it
    }
  };
  {
    const std::lock_guard lock(mutex_);
    disarm();  // before others are asked for their next
    const auto now = Clock::now();
    // The entries themselves, as there may be no memory for others.
    while (!closed_ && !entries_.empty() && entries_.begin()->first <= now) {
      expired.insert(entries_.extract(entries_.begin()));
    }
    arm_next();
  }
  for (const auto& [deadline, entry] : expired) {
    try {
      entry->expire();
    } catch (...) {
      detail::log_exception("at a deadline");  // the others' have passed, too
    }
  }
  expired.clear();
  std::size_t index = 0;
  while (const auto others = next_of_others(index)) {
    expire_all(*others);
  }
  const std::lock_guard lock(mutex_);
  arm_next();
}

/// Of those that are kept elsewhere.
KVFERRY_INLINE void DeadlineQueue::expire_all(Others& others) {
  const auto now = Clock::now();
  for (bool more = true; more;) {
    try {
      more = others.expire_one(now);
    } catch (...) {
      detail::log_exception("at a deadline");  // the others' have passed, too
    }
  }
  if (const auto next = others.next()) {
    try {
      await(*next);
    } catch (const std::exception&) {
      detail::log_exception("when the next deadline was set");  // the next operation sets it
    }
  }
}

KVFERRY_INLINE std::error_code OperationRegistry::add(const std::shared_ptr<Operation>& operation) {
  bool known = true;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      return errc::closed;
    }
    if (pending_.size() >= limit_) {
      return errc::resource_limit;
    }
    enter(operation);
    known = std::exchange(awaits_deadlines_, true);
  }
  try {
    if (!known) {
      deadlines_->add(weak_from_this());
    }
    deadlines_->await(operation->deadline());
  } catch (const std::bad_alloc&) {
    {
      const std::lock_guard lock(mutex_);
      awaits_deadlines_ = known;
    }
    remove(*operation);  // or the channel would wait for its end
    return std::make_error_code(std::errc::not_enough_memory);
  }
  return {};
}

KVFERRY_INLINE void OperationRegistry::enter(const std::shared_ptr<Operation>& operation) {
  // Deadlines mostly come in their order.
  if (spares_.empty()) {
    operation->entry_ = pending_.emplace_hint(pending_.end(), operation->deadline(), PendingOperation());
  } else {
    spares_.back().key() = operation->deadline();
    operation->entry_ = pending_.insert(pending_.end(), std::move(spares_.back()));
    spares_.pop_back();
  }
  operation->entry_->second = {operation, ++last_number_};
  operation->entered_ = true;
  if (first_waiting_ == pending_.end() || operation->deadline() < first_waiting_->first) {
    first_waiting_ = operation->entry_;
  }
}

KVFERRY_INLINE void OperationRegistry::remove(Operation& operation) {
  std::shared_ptr<Operation> removed;
  const std::lock_guard lock(mutex_);
  if (!std::exchange(operation.entered_, false)) {
    return;
  }
  PendingOperation& entry = operation.entry_->second;
  if (!awaited_.empty()) {
    std::erase_if(awaited_, [&](Awaited& awaited) {
      const bool last = awaited.concerns(entry) && --awaited.left == 0;
      if (last) {
        awaited.done();
      }
      return last;
    });
  }
  removed = std::move(entry.operation);
  if (operation.entry_ == first_waiting_) {
    ++first_waiting_;
  }
  if (spares_.size() < most_spares) {
    spares_.push_back(pending_.extract(operation.entry_));
  } else {
    pending_.erase(operation.entry_);
  }
  if (pending_.empty()) {
    empty_.notify_all();
  }
}

KVFERRY_INLINE bool OperationRegistry::expire_one(Clock::time_point now) {
  std::shared_ptr<Operation> late;
  {
    const std::lock_guard lock(mutex_);
    for (; first_waiting_ != pending_.end() && first_waiting_->first <= now && !late; ++first_waiting_) {
      if (!std::exchange(first_waiting_->second.expired, true)) {
        late = first_waiting_->second.operation;
      }
    }
  }
  if (late) {
    late->expire();
  }
  return late != nullptr;
}

KVFERRY_INLINE std::optional<Clock::time_point> OperationRegistry::next() const {
  const std::lock_guard lock(mutex_);
  PendingOperations::const_iterator it = first_waiting_;
  while (it != pending_.end() && it->second.expired) {
    ++it;
  }
  return it == pending_.end() ? std::nullopt : std::optional(it->first);
}

KVFERRY_INLINE void OperationRegistry::when_writes_ended(std::string_view peer_id, std::function<void()> done) {
  (void)when_ended(
      [peer_id = std::string(peer_id)](const TransferRequest& request) {
        return request.kind == TransferKind::write && request.peer_id == peer_id;
      },
      std::move(done));
}

KVFERRY_INLINE void OperationRegistry::when_operations_ended(std::string_view peer_id, std::uint64_t last_number,
                                                             std::function<void()> done) {
  const std::lock_guard lock(mutex_);
  await({[peer_id = std::string(peer_id)](const TransferRequest& request) { return request.peer_id == peer_id; },
         last_number, 0, std::move(done)});
}

KVFERRY_INLINE std::uint64_t OperationRegistry::when_ended(std::function<bool(const TransferRequest&)> concerned,
                                                           std::function<void()> done) {
  const std::lock_guard lock(mutex_);
  await({std::move(concerned), last_number_, 0, std::move(done)});
  return last_number_;
}

/// With the lock held.
KVFERRY_INLINE void OperationRegistry::await(Awaited awaited) {
  awaited.left = static_cast<std::size_t>(
      std::ranges::count_if(pending_, [&](const auto& entry) { return awaited.concerns(entry.second); }));
  if (awaited.left == 0) {
    awaited.done();
  } else {
    awaited_.push_back(std::move(awaited));
  }
}

KVFERRY_INLINE std::uint64_t OperationRegistry::stop(std::string_view peer_id, std::error_code cause) {
  return stop([peer_id](const TransferRequest& request) { return request.peer_id == peer_id; }, cause);
}

KVFERRY_INLINE std::uint64_t OperationRegistry::stop(const std::function<bool(const TransferRequest&)>& concerned,
                                                     std::error_code cause, std::uint64_t last_number) {
  std::vector<std::shared_ptr<Operation>> stopped;
  std::uint64_t last_added = 0;
  {
    const std::lock_guard lock(mutex_);
    last_added = last_number_;
    for (const auto& [key, entry] : pending_) {
      if (entry.number <= last_number && concerned(entry.operation->request())) {
        stopped.push_back(entry.operation);
      }
    }
  }
  for (const auto& operation : stopped) {
    operation->request_stop(cause);
  }
  return last_added;
}

KVFERRY_INLINE void OperationRegistry::close(std::error_code cause) {
  std::vector<std::shared_ptr<Operation>> all;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    all.reserve(pending_.size());
    for (const auto& [key, entry] : pending_) {
      all.push_back(entry.operation);
    }
  }
  for (const auto& operation : all) {
    operation->request_stop(cause);
  }
}

KVFERRY_INLINE void OperationRegistry::wait_until_empty() {
  std::unique_lock lock(mutex_);
  empty_.wait(lock, [&] { return pending_.empty(); });
}

}  // namespace kvferry::kit
