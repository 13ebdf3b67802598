// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/steady_timer.hpp>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/operation.hpp>

#include "gate.hpp"
#include "transfer_counters.hpp"

namespace kvferry::kit {

/// Calls `expire` on what has not been removed by its deadline. One timer for all, armed only for a deadline earlier
/// than the one it is armed for: the usual deadlines are all about as long, so the timer is touched once in a while,
/// not once an operation.
class DeadlineQueue : public std::enable_shared_from_this<DeadlineQueue> {
 public:
  explicit DeadlineQueue(const asio::any_io_executor& executor) : timer_(executor) {}

  /// For those who end something before its deadline, on threads of their own.
  [[nodiscard]] const std::shared_ptr<Gate>& gate() const noexcept { return gate_; }

  void add(Clock::time_point deadline, std::shared_ptr<Expirable> entry);
  void remove(Clock::time_point deadline, const Expirable& entry);
  /// Drops all entries and stops the timer. Later `add`s are ignored.
  void close();
  /// Entries that have neither expired nor been removed.
  [[nodiscard]] std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  void arm(Clock::time_point deadline);
  void on_timer();

  const std::shared_ptr<Gate> gate_ = std::make_shared<Gate>();
  mutable std::mutex mutex_;
  std::multimap<Clock::time_point, std::shared_ptr<Expirable>> entries_;
  asio::steady_timer timer_;
  std::optional<Clock::time_point> armed_;
  bool closed_ = false;
};

/// The operations of a channel that have not ended yet, and the numbers of all.
class OperationRegistry {
 public:
  OperationRegistry(std::shared_ptr<DeadlineQueue> deadlines, std::size_t limit,
                    std::shared_ptr<Logger> logger = std::make_shared<Logger>())
      : deadlines_(std::move(deadlines)), limit_(limit), logger_(std::move(logger)) {}

  /// @return `errc::closed` or `errc::resource_limit` if the operation wasn't taken.
  [[nodiscard]] std::error_code add(const std::shared_ptr<Operation>& operation);
  void remove(const Operation& operation);
  /// Refuses further operations and asks all pending ones to stop.
  void close(std::error_code cause);
  void wait_until_empty();

  [[nodiscard]] TransferCounters& counters() noexcept { return counters_; }
  [[nodiscard]] Logger& logger() noexcept { return *logger_; }
  [[nodiscard]] const std::shared_ptr<Gate>& gate() const noexcept { return deadlines_->gate(); }

 private:
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::size_t limit_;
  const std::shared_ptr<Logger> logger_;
  TransferCounters counters_;
  std::mutex mutex_;
  std::condition_variable empty_;
  std::unordered_map<const Operation*, std::shared_ptr<Operation>> pending_;
  bool closed_ = false;
};

}  // namespace kvferry::kit
