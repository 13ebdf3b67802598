// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Marks the calling thread as being inside a call that starts an operation: a handler that runs there was called
/// inline.
class InitiationScope {
 public:
  InitiationScope() { ++depth(); }
  InitiationScope(const InitiationScope&) = delete;
  InitiationScope& operator=(const InitiationScope&) = delete;
  ~InitiationScope() { --depth(); }

  [[nodiscard]] static bool active() { return depth() > 0; }

 private:
  static int& depth() {
    thread_local int value = 0;
    return value;
  }
};

/// Watches one asynchronous operation: that its handler runs exactly once, and never inside the call that started it.
class ProbeBase {
 public:
  ProbeBase(std::string what, std::chrono::milliseconds limit) : what_(std::move(what)), limit_(limit) {}
  ProbeBase(const ProbeBase&) = delete;
  ProbeBase& operator=(const ProbeBase&) = delete;
  virtual ~ProbeBase() = default;

  /// Waits until the handler has run; a test failure if it doesn't, or if it was destroyed instead.
  bool wait() { return wait_for(limit_); }

  bool wait_for(std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    // A call that was missed once is not waited for again.
    const bool settled = changed_.wait_for(lock, reported_ ? std::chrono::milliseconds(0) : limit,
                                           [this] { return calls_ > 0 || dropped_; });
    if (calls_ > 0) {
      return true;
    }
    if (!reported_) {
      reported_ = true;
      lock.unlock();
      ADD_FAILURE() << what_
                    << (settled ? ": the handler was destroyed without having been called"
                                : ": the handler was not called within " + std::to_string(limit.count()) + " ms");
    }
    return false;
  }

  [[nodiscard]] bool ended() const {
    const std::lock_guard lock(mutex_);
    return calls_ > 0;
  }

  /// The thread that the handler ran on.
  [[nodiscard]] std::thread::id thread() const {
    const std::lock_guard lock(mutex_);
    return thread_;
  }

  /// Call it when no handler can run any more.
  void verify() {
    if (!wait()) {
      return;
    }
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(calls_, 1) << what_ << ": the handler was called more than once";
    EXPECT_FALSE(inline_) << what_ << ": the handler ran inside the call that started the operation";
  }

 protected:
  void dropped() {
    const std::lock_guard lock(mutex_);
    dropped_ = true;
    changed_.notify_all();
  }

  /// Notes a call of the handler; `record` keeps the results of the first.
  template <class Record>
  void called(Record record) {
    const std::lock_guard lock(mutex_);
    if (++calls_ == 1) {
      thread_ = std::this_thread::get_id();
      record();
    }
    inline_ = inline_ || InitiationScope::active();
    changed_.notify_all();
  }

  mutable std::mutex mutex_;

 private:
  const std::string what_;
  const std::chrono::milliseconds limit_;
  std::condition_variable changed_;
  int calls_ = 0;
  bool inline_ = false;
  bool dropped_ = false;
  bool reported_ = false;
  std::thread::id thread_;
};

/// A `ProbeBase` for handlers of `void(Results...)`.
template <class... Results>
class Probe : public ProbeBase, public std::enable_shared_from_this<Probe<Results...>> {
 public:
  using ProbeBase::ProbeBase;

  /// The completion handler; move-only, as handlers may be.
  class Handler {
   public:
    explicit Handler(std::shared_ptr<Probe> probe) : probe_(std::move(probe)) {}
    Handler(Handler&&) noexcept = default;
    Handler& operator=(Handler&&) = delete;
    ~Handler() {
      if (probe_ != nullptr) {
        probe_->dropped();
      }
    }

    void operator()(Results... results) {
      // Kept alive here: what the test waits for may be the last thing that holds the probe.
      const auto probe = probe_;
      probe->complete(std::move(results)...);
    }

   private:
    std::shared_ptr<Probe> probe_;
  };

  [[nodiscard]] Handler handler() { return Handler(this->shared_from_this()); }

  /// Waits for the results. If they don't come, a test failure and the results of a failed operation.
  std::tuple<Results...> results() {
    wait();
    const std::lock_guard lock(this->mutex_);
    return results_.value_or(std::tuple<Results...>{});
  }

  /// Waits for the error. If there is none to be had, `errc::not_supported` and a test failure.
  std::error_code error() { return wait() ? std::get<0>(results()) : make_error_code(errc::not_supported); }

 private:
  void complete(Results... results) {
    this->called([&] { results_.emplace(std::move(results)...); });
  }

  std::optional<std::tuple<Results...>> results_;
};

/// An operation's error and number of objects, to be compared and printed as one.
struct Outcome {
  std::error_code error;
  std::size_t count = 0;

  friend bool operator==(const Outcome&, const Outcome&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
    return out << outcome.count << " objects, " << outcome.error << " (" << outcome.error.message() << ")";
  }
};

[[nodiscard]] inline Outcome done(std::size_t count) { return {{}, count}; }
[[nodiscard]] inline Outcome failed(errc code, std::size_t count = 0) { return {make_error_code(code), count}; }

/// Whether an error belongs to a condition; says which error it is if not.
[[nodiscard]] inline ::testing::AssertionResult is(std::error_code error, condition expected) {
  if (error == expected) {
    return ::testing::AssertionSuccess() << error << " (" << error.message() << ")";
  }
  return ::testing::AssertionFailure() << error << " (" << error.message() << ") is no "
                                       << make_error_condition(expected).message();
}

/// One asynchronous transfer and all that it reports to.
class Transfer : public Probe<std::error_code, std::size_t> {
 public:
  /// The value of statuses and sizes before the operation writes them.
  static inline const std::error_code unwritten_status = std::make_error_code(std::errc::state_not_recoverable);
  static constexpr std::size_t unwritten_size = 0x5a5a5a5a;

  Transfer(const std::string& what, std::chrono::milliseconds limit, std::size_t count)
      : Probe(what, limit), statuses_(count, unwritten_status), sizes_(count, unwritten_size) {}

  /// Waits for the end; a test failure if it doesn't come.
  Outcome outcome() {
    if (!wait()) {
      return {unwritten_status, 0};
    }
    const auto [error, count] = results();
    return {error, count};
  }

  /// @name Read these only after the end.
  /// @{
  [[nodiscard]] std::vector<std::error_code>& statuses() { return statuses_; }
  [[nodiscard]] std::vector<std::size_t>& sizes() { return sizes_; }
  [[nodiscard]] std::string& diagnostic() { return diagnostic_; }
  /// @}

  /// Whether the count is the number of good statuses, and all statuses were written.
  [[nodiscard]] ::testing::AssertionResult consistent() {
    const auto [error, count] = outcome();
    std::size_t good = 0;
    for (std::size_t i = 0; i < statuses_.size(); ++i) {
      if (statuses_[i] == unwritten_status) {
        return ::testing::AssertionFailure() << "status " << i << " was not written";
      }
      good += statuses_[i] ? 0U : 1U;
    }
    if (good != count) {
      return ::testing::AssertionFailure() << good << " good statuses, but a count of " << count;
    }
    if (!error && count != statuses_.size()) {
      return ::testing::AssertionFailure() << "success with " << count << " objects of " << statuses_.size();
    }
    if (error && count == statuses_.size() && count > 0) {
      return ::testing::AssertionFailure() << "all " << count << " objects transferred, but " << error.message();
    }
    return ::testing::AssertionSuccess();
  }

 private:
  std::vector<std::error_code> statuses_;
  std::vector<std::size_t> sizes_;
  std::string diagnostic_;
};

using SideMessageProbe = Probe<std::error_code, std::optional<SideMessage>>;
using NotificationProbe = Probe<std::error_code, Notification>;

}  // namespace kvferry::testing
