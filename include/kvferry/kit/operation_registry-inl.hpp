// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/operation_registry.hpp>

#include <algorithm>
#include <exception>
#include <new>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void DeadlineQueue::add(Clock::time_point deadline, std::shared_ptr<Expirable> entry) {
  const std::lock_guard lock(mutex_);
  if (closed_) {
    return;
  }
  const auto added = spares_.add(entries_, deadline);
  added->second = std::move(entry);
  try {
    arm();
  } catch (...) {
    entries_.erase(added);
    throw;
  }
}

KVFERRY_INLINE DeadlineQueue::Entries::iterator DeadlineQueue::find(Clock::time_point deadline,
                                                                    const Expirable& entry) {
  const auto [first, last] = entries_.equal_range(deadline);
  const auto it = std::find_if(first, last, [&](const auto& one) { return one.second.get() == &entry; });
  return it == last ? entries_.end() : it;
}

KVFERRY_INLINE void DeadlineQueue::remove(Clock::time_point deadline, const Expirable& entry) {
  std::shared_ptr<Expirable> removed;  // destroyed after the lock is released
  const std::lock_guard lock(mutex_);
  if (const auto it = find(deadline, entry); it != entries_.end()) {
    removed = spares_.take(entries_, it);
  }
  if (!armed_) {
    try_to_arm();
  }
}

KVFERRY_INLINE void DeadlineQueue::hasten(Clock::time_point deadline, const Expirable& entry) noexcept {
  const std::lock_guard lock(mutex_);
  if (const auto it = find(deadline, entry); it != entries_.end()) {
    auto node = entries_.extract(it);
    node.key() = Clock::now();
    entries_.insert(std::move(node));
    try_to_arm();
  }
}

KVFERRY_INLINE void DeadlineQueue::close() {
  Entries dropped;
  const std::lock_guard lock(mutex_);
  closed_ = true;
  dropped.swap(entries_);
  timer_.reset();
}

/// For the first of the entries. After one that has thrown the timer isn't armed at all: whatever is done next with the
/// queue tries again.
KVFERRY_INLINE void DeadlineQueue::arm() {
  if (closed_ || entries_.empty() || (armed_ && *armed_ <= entries_.begin()->first)) {
    return;
  }
  const auto deadline = entries_.begin()->first;
  armed_.reset();  // what follows may throw
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
}

KVFERRY_INLINE void DeadlineQueue::try_to_arm() noexcept {
  try {
    arm();
  } catch (const std::exception&) {
    detail::log_exception("when the next deadline was set");
  }
}

KVFERRY_INLINE void DeadlineQueue::on_timer() {
  /// After which what has found no memory at its deadline tries again.
  constexpr std::chrono::milliseconds pause{100};
  Entries expired;
  {
    const std::lock_guard lock(mutex_);
    armed_.reset();
    const auto now = Clock::now();
    // The entries themselves, as there may be no memory for others.
    while (!closed_ && !entries_.empty() && entries_.begin()->first <= now) {
      expired.insert(entries_.extract(entries_.begin()));
    }
    try_to_arm();
  }
  Entries again;
  while (!expired.empty()) {
    auto node = expired.extract(expired.begin());
    try {
      node.mapped()->expire();
    } catch (const std::bad_alloc&) {
      detail::log_exception("at a deadline, which is tried again");
      node.key() = Clock::now() + pause;
      again.insert(std::move(node));
    } catch (...) {
      detail::log_exception("at a deadline");  // the others' have passed, too
    }
  }
  const std::lock_guard lock(mutex_);
  if (!closed_) {
    entries_.merge(again);
  }
  try_to_arm();
}

KVFERRY_INLINE std::error_code OperationRegistry::add(const std::shared_ptr<Operation>& operation) {
  try {
    {
      const std::lock_guard lock(mutex_);
      if (closed_) {
        return errc::closed;
      }
      if (pending_.size() >= limit_) {
        return errc::resource_limit;
      }
      spares_.add(pending_, operation.get())->second = {operation, ++last_number_};
    }
    deadlines_->add(operation->deadline(), operation);
  } catch (const std::bad_alloc&) {
    remove(*operation);  // or the channel would wait for its end
    return std::make_error_code(std::errc::not_enough_memory);
  }
  return {};
}

KVFERRY_INLINE void OperationRegistry::remove(const Operation& operation) {
  deadlines_->remove(operation.deadline(), operation);
  std::shared_ptr<Operation> removed;  // destroyed after the lock is released
  const std::lock_guard lock(mutex_);
  if (const auto it = pending_.find(&operation); it != pending_.end()) {
    const Entry entry = spares_.take(pending_, it);
    if (pending_.empty()) {
      empty_.notify_all();
    }
    // An entry that has nothing to wait for any more is removed before it is called: a call that throws loses none of the others.
    for (auto awaited = awaited_.begin(); awaited != awaited_.end();) {
      if (!awaited->concerns(entry) || --awaited->left != 0) {
        ++awaited;
        continue;
      }
      const auto done = std::move(awaited->done);
      awaited = awaited_.erase(awaited);
      try {
        done();
      } catch (...) {
        detail::log_exception("when the operations had ended that something waited for");
      }
    }
    removed = entry.operation;
  }
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
