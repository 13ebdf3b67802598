// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/operation.hpp>

#include <algorithm>
#include <exception>
#include <limits>
#include <new>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>

#include <kvferry/detail/recycled.hpp>
#include <kvferry/detail/text.hpp>

#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_counters.hpp>
#include <kvferry/kit/striped_operation.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Marks a status that no object has got yet; never seen by callers.
KVFERRY_INLINE std::error_code undecided() noexcept { return {std::numeric_limits<int>::min(), error_category()}; }

}  // namespace internal

KVFERRY_INLINE Clock::time_point deadline_after(std::chrono::milliseconds timeout) noexcept {
  constexpr std::chrono::milliseconds longest = std::chrono::hours(24 * 365);
  return Clock::now() + std::clamp(timeout, std::chrono::milliseconds::zero(), longest);
}

KVFERRY_INLINE Operation::Operation(TransferRequest request, Completion completion, Clock::time_point deadline,
                                    std::shared_ptr<OperationRegistry> registry)
    : request_(std::move(request)),
      completion_(std::move(completion)),
      deadline_(deadline),
      registry_(std::move(registry)) {
  std::ranges::fill(request_.statuses, undecided());
  registry_->counters().count_start(request_.kind);
}

KVFERRY_INLINE Operation::~Operation() {
  kvferry::detail::let_go(std::move(request_.objects));
  kvferry::detail::let_go(std::move(request_.remote_indexes));
}

KVFERRY_INLINE void Operation::landed(std::size_t first, std::size_t count) noexcept {
  count_landed(first, count, LocalBytes(request_).total(first, first + count));
}

KVFERRY_INLINE void Operation::received(std::size_t index, std::size_t bytes) noexcept {
  set_size(index, bytes);
  count_landed(index, 1, bytes);
}

KVFERRY_INLINE void Operation::count_landed(std::size_t first, std::size_t count, std::uint64_t bytes) noexcept {
  landed_.fetch_add(count, std::memory_order_relaxed);
  landed_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  if (!request_.statuses.empty()) {
    std::ranges::fill(request_.statuses.subspan(first, count), std::error_code());
  }
}

KVFERRY_INLINE void Operation::failed(std::size_t index, std::error_code cause) noexcept {
  if (!request_.statuses.empty()) {
    request_.statuses[index] = cause;
  }
  const std::lock_guard lock(mutex_);
  if (!first_object_error_) {
    first_object_error_ = cause;
    object_failed_.store(true, std::memory_order_release);
  }
}

KVFERRY_INLINE void Operation::start_over() noexcept {
  landed_ = 0;
  landed_bytes_ = 0;
  std::ranges::fill(request_.statuses, undecided());
  const std::lock_guard lock(mutex_);
  first_object_error_.clear();
  object_failed_.store(false, std::memory_order_release);
}

KVFERRY_INLINE void Operation::set_size(std::size_t index, std::size_t bytes) noexcept {
  if (!request_.sizes.empty()) {
    request_.sizes[index] = bytes;
  }
}

KVFERRY_INLINE void Operation::finish(std::error_code cause, std::string diagnostic) {
  finish(cause, std::move(diagnostic), false);
}

KVFERRY_INLINE void Operation::finish(std::error_code cause, std::string diagnostic, bool stopped) {
  if (finished_.exchange(true)) {
    return;
  }
  if (!cause && object_failed_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    cause = first_object_error_;
  }
  const std::shared_ptr<PeerCounters> counters =
      counted_.load(std::memory_order_acquire) ? std::move(peer_counters_) : nullptr;
  const std::size_t transferred = landed_.load(std::memory_order_relaxed);
  std::ranges::replace(request_.statuses, undecided(), cause);
  if (cause) {
    describe_failure(cause, std::move(diagnostic), transferred);
    registry_->logger().log(LogLevel::debug, "operation_failed", request_.peer_id, cause, [&] {
      return std::string(to_string(request_.kind)) + " of " + std::to_string(object_count()) +
             " objects: " + cause.message() + " (" + std::to_string(transferred) + " transferred)";
    });
  }
  if (counters) {
    (cause ? counters->failed : counters->succeeded).fetch_add(1, std::memory_order_relaxed);
    counters->bytes.fetch_add(landed_bytes_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  registry_->counters().count_end(
      request_.kind, {cause, transferred, landed_bytes_.load(std::memory_order_relaxed), Clock::now() - started_});
  auto completion = std::move(completion_);
  // Out of the registry first: once the handler can run, the channel may be closed and gone.
  registry_->remove(*this);
  if (stopped && cause != errc::closed) {
    registry_->stopped_waiting(request_.peer_id);  // before its caller may call again, who would join what is to end
  }
  completion(cause, transferred);
}

KVFERRY_INLINE void Operation::describe_failure(std::error_code cause, std::string diagnostic,
                                                std::size_t transferred) noexcept {
  if (request_.diagnostic == nullptr) {
    return;
  }
  try {
    if (diagnostic.empty()) {
      diagnostic = cause.message();
    }
    const std::string what =
        request_.objects.empty() && !request_.notification.empty()
            ? "notification alone"
            : std::string(to_string(request_.kind)) + " of " + std::to_string(object_count()) + " objects";
    *request_.diagnostic = what + ", peer " + in_quotes(request_.peer_id) + ": " + diagnostic + " (" +
                           std::to_string(transferred) + " transferred)";
  } catch (const std::exception&) {
    request_.diagnostic->clear();  // there is no memory for a sentence, but an end there is
  }
}

KVFERRY_INLINE void Operation::count_for(std::shared_ptr<PeerCounters> counters) noexcept {
  peer_counters_ = std::move(counters);
  counted_.store(true, std::memory_order_release);
}

KVFERRY_INLINE void Operation::request_stop(std::error_code cause) {
  std::shared_ptr<Link> link;
  {
    const std::lock_guard lock(mutex_);
    if ((stop_cause_ && !stops_again_) || finished_) {
      return;
    }
    stop_cause_ = cause;
    stop_asked_.store(true, std::memory_order_release);
    stops_again_ = false;
    link = link_.lock();
    if (on_link_ && !link) {
      return;  // the link is going down and ends its operations itself
    }
  }
  if (link) {
    try {
      link->stop(shared_from_this());
    } catch (...) {
      const std::lock_guard lock(mutex_);
      // The deadline or the next cancellation asks again. The cause stays: a part of the link may know of the stop, and
      // asks for it when it ends.
      stops_again_ = true;
      throw;
    }
  } else {
    std::string why;
    try {
      const std::string awaited = cause == errc::timed_out ? registry_->awaited(request_.peer_id) : std::string();
      why = awaited.empty() ? awaited : cause.message() + ": " + awaited;
    } catch (const std::exception&) {
      // There is no memory for a sentence. Nobody else ends it.
    }
    finish(cause, std::move(why), true);
  }
}

KVFERRY_INLINE std::uint64_t Operation::mean_for(std::uint64_t instance) noexcept {
  std::uint64_t none = 0;
  return meant_for_.compare_exchange_strong(none, instance) ? instance : none;
}

KVFERRY_INLINE std::error_code Operation::locked_stop_cause() const {
  const std::lock_guard lock(mutex_);
  return stop_cause_;
}

KVFERRY_INLINE void Operation::start_on(const std::shared_ptr<Link>& link) {
  {
    const std::lock_guard lock(mutex_);
    if (stop_cause_ || finished_) {
      return;  // request_stop ended it
    }
    link_ = link;
    on_link_ = true;
  }
  try {
    link->start(shared_from_this());
  } catch (...) {
    Failure failure = failure_being_handled();
    if (in_parts_) {
      // Parts that are under way have buffers in use; it ends with the last of them, whatever is thrown here.
      try {
        request_stop(failure.code);
      } catch (...) {
        detail::log_exception("when an operation was to stop that could be started in part alone");
      }
    } else {
      finish(failure.code, std::move(failure.sentence));
    }
  }
}

KVFERRY_INLINE void Operation::accept_cancellation() {
  if (completion_.cancellable()) {
    completion_.on_cancel(cancellation(registry_->gate(), weak_from_this(),
                                       [](Operation& operation) { operation.request_stop(errc::cancelled); }));
  }
}

KVFERRY_INLINE void Operation::expire() { request_stop(errc::timed_out); }

}  // namespace kvferry::kit
