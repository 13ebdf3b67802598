// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/completion_queue.hpp>

#include <poll.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include <kvferry/detail/event_descriptor.hpp>
#include <kvferry/detail/process.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace detail {

class QueuedOperation {
 public:
  QueuedOperation(std::shared_ptr<QueueState> queue, std::uint64_t user_data)
      : queue_(std::move(queue)), user_data_(user_data) {}

  [[nodiscard]] std::optional<CompletionEntry> result() const {
    if (origin_.was_forked()) {
      return std::nullopt;  // a thread of the parent's may have had the lock
    }
    const std::lock_guard lock(mutex_);
    return result_;
  }

  void set_cancel(std::function<void(asio::cancellation_type)> cancel) {
    const std::lock_guard lock(mutex_);
    if (!result_) {
      cancel_ = std::move(cancel);
    }
  }

  void cancel() {
    if (origin_.was_forked()) {
      return;
    }
    std::function<void(asio::cancellation_type)> cancel;
    {
      const std::lock_guard lock(mutex_);
      cancel = cancel_;
    }
    if (cancel) {
      cancel(asio::cancellation_type::terminal);
    }
  }

  /// @return what cancelled it: to be let go without locks, as it may own whatever it likes.
  [[nodiscard]] std::function<void(asio::cancellation_type)> end(std::error_code error, std::size_t count) {
    const std::lock_guard lock(mutex_);
    result_ = CompletionEntry{user_data_, error, count};
    return std::exchange(cancel_, nullptr);
  }

  [[nodiscard]] const std::shared_ptr<QueueState>& queue() const noexcept { return queue_; }

  std::shared_ptr<QueuedOperation> next;  ///< In the queue, with its lock held.

 private:
  const ProcessOfOrigin origin_;
  mutable std::mutex mutex_;
  const std::shared_ptr<QueueState> queue_;
  const std::uint64_t user_data_;
  std::function<void(asio::cancellation_type)> cancel_;
  std::optional<CompletionEntry> result_;
};

/// The ended operations of a queue, in a list that they make themselves.
class QueueState {
 public:
  [[nodiscard]] int descriptor() const noexcept { return event_->descriptor(); }
  /// Then nothing of it may be touched: a thread of the parent's may have had the lock, and the parent polls the descriptor.
  [[nodiscard]] bool inherited() const noexcept { return origin_.was_forked(); }

  /// The stored result is there when the handle says that the operation has ended.
  void end(std::shared_ptr<QueuedOperation> operation, std::error_code error, std::size_t count, StoreResult store,
           void* result, void* value) {
    std::function<void(asio::cancellation_type)> dropped;
    if (inherited()) {
      dropped = operation->end(error, count);  // of a channel that the parent made as well
      return;
    }
    const std::lock_guard lock(mutex_);
    if (event_ && store != nullptr) {
      store(result, value);
    }
    dropped = operation->end(error, count);
    if (!event_) {
      return;
    }
    QueuedOperation* const last = operation.get();
    (last_ == nullptr ? first_ : last_->next) = std::move(operation);
    if (last_ == nullptr) {
      event_->set();
    }
    last_ = last;
  }

  [[nodiscard]] std::size_t drain(std::span<CompletionEntry> entries) {
    if (inherited()) {
      return 0;
    }
    std::shared_ptr<QueuedOperation> drained;  // let go without the lock
    std::size_t count = 0;
    {
      const std::lock_guard lock(mutex_);
      if (first_ == nullptr || entries.empty()) {
        return 0;
      }
      drained = std::move(first_);
      QueuedOperation* taken = drained.get();
      for (;;) {
        entries[count++] = *taken->result();
        if (count == entries.size() || taken->next == nullptr) {
          break;
        }
        taken = taken->next.get();
      }
      first_ = std::move(taken->next);
      if (first_ == nullptr) {
        last_ = nullptr;
        event_->clear();
      }
    }
    let_go(std::move(drained));
    return count;
  }

  /// A thread that is woken may find that another one has taken the entry; then it sleeps on.
  [[nodiscard]] std::size_t wait(std::span<CompletionEntry> entries, std::optional<std::chrono::milliseconds> timeout) {
    using namespace std::chrono;
    using Clock = steady_clock;
    constexpr milliseconds longest_sleep{std::numeric_limits<int>::max()};
    const auto now = Clock::now();
    const bool endless = !timeout || *timeout >= floor<milliseconds>(Clock::time_point::max() - now);
    const auto until = endless ? Clock::time_point::max() : now + std::max(*timeout, milliseconds(0));
    for (;;) {
      const std::size_t count = drain(entries);
      const auto left = ceil<milliseconds>(until - Clock::now());
      if (count != 0 || entries.empty() || inherited() || left <= milliseconds(0)) {
        return count;
      }
      pollfd ready{descriptor(), POLLIN, 0};
      ::poll(&ready, 1, endless ? -1 : static_cast<int>(std::min(left, longest_sleep).count()));
    }
  }

  void close() {
    std::shared_ptr<QueuedOperation> dropped;
    {
      const std::lock_guard lock(mutex_);
      event_.reset();
      dropped = std::move(first_);
      last_ = nullptr;
    }
    let_go(std::move(dropped));
  }

 private:
  /// One after the other: a long list would overflow the stack.
  static void let_go(std::shared_ptr<QueuedOperation> list) {
    while (list != nullptr) {
      list = std::exchange(list->next, nullptr);
    }
  }

  const ProcessOfOrigin origin_{};
  std::mutex mutex_;
  std::optional<EventDescriptor> event_{std::in_place};  ///< Gone when closed.
  std::shared_ptr<QueuedOperation> first_;
  QueuedOperation* last_ = nullptr;
};

KVFERRY_INLINE std::shared_ptr<QueuedOperation> make_queued_operation(std::shared_ptr<QueueState> queue,
                                                                      std::uint64_t user_data) {
  return std::make_shared<QueuedOperation>(std::move(queue), user_data);
}

KVFERRY_INLINE void end_queued_operation(const std::shared_ptr<QueuedOperation>& operation, std::error_code error,
                                         std::size_t count, StoreResult store, void* result, void* value) noexcept {
  operation->queue()->end(operation, error, count, store, result, value);
}

KVFERRY_INLINE void set_cancel(QueuedOperation& operation, std::function<void(asio::cancellation_type)> cancel) {
  operation.set_cancel(std::move(cancel));
}

}  // namespace detail

KVFERRY_INLINE bool OperationHandle::ended() const { return result().has_value(); }

KVFERRY_INLINE std::optional<CompletionEntry> OperationHandle::result() const {
  return operation_ ? operation_->result() : std::nullopt;
}

KVFERRY_INLINE void OperationHandle::cancel() const {
  if (operation_) {
    operation_->cancel();
  }
}

KVFERRY_INLINE CompletionQueue::CompletionQueue() : state_(std::make_shared<detail::QueueState>()) {}

KVFERRY_INLINE CompletionQueue::~CompletionQueue() {
  if (state_->inherited()) {
    keep_inherited(state_);
    return;
  }
  state_->close();
}

KVFERRY_INLINE int CompletionQueue::descriptor() const noexcept { return state_->descriptor(); }

KVFERRY_INLINE std::size_t CompletionQueue::drain(std::span<CompletionEntry> entries) { return state_->drain(entries); }

KVFERRY_INLINE std::size_t CompletionQueue::wait(std::span<CompletionEntry> entries, std::optional<std::chrono::milliseconds> timeout) {
  return state_->wait(entries, timeout);
}

}  // namespace kvferry
