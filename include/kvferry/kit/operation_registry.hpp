// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_OPERATION_REGISTRY_HPP
#define KVFERRY_KIT_OPERATION_REGISTRY_HPP

#include <asio/any_io_executor.hpp>
#include <asio/steady_timer.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/operation.hpp>

#include <kvferry/kit/gate.hpp>
#include <kvferry/kit/spare_nodes.hpp>
#include <kvferry/kit/transfer_counters.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Work that is done for a call may last this much longer than the call. So it is always the call that reports the
/// timeout, with the reason for its wait, and not another timer.
inline constexpr std::chrono::milliseconds longer_than_the_call{250};

/// Describes the event for which the connection to a peer waits now; empty if that isn't known.
using AwaitedOfPeer = std::function<std::string(std::string_view peer_id)>;
/// Is told that somebody doesn't wait any longer for the connection to a peer. Must not throw.
using StoppedWaiting = std::function<void(std::string_view peer_id)>;

/// Calls `expire` on entries that have not been removed by their deadline. All share one timer, which is armed anew
/// only for an earlier deadline. The usual timeouts are about equal, so the timer is rarely touched, and not for each
/// operation.
class DeadlineQueue : public std::enable_shared_from_this<DeadlineQueue> {
 public:
  explicit DeadlineQueue(const asio::any_io_executor& executor) : timer_(std::in_place, executor) {}

  /// For those who end something before its deadline, on threads of their own.
  [[nodiscard]] const std::shared_ptr<Gate>& gate() const noexcept { return gate_; }

  /// If it throws - memory is used up -, the entry hasn't been added.
  void add(Clock::time_point deadline, std::shared_ptr<Expirable> entry);
  void remove(Clock::time_point deadline, const Expirable& entry);
  /// Has an entry that was added with this deadline expire as soon as possible. Needs no memory.
  void hasten(Clock::time_point deadline, const Expirable& entry) noexcept;
  /// Drops all entries and the timer, so the queue may outlive the executor's context. Later `add`s are ignored.
  void close();
  /// Entries that have neither expired nor been removed.
  [[nodiscard]] std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  using Entries = std::multimap<Clock::time_point, std::shared_ptr<Expirable>>;

  /// All of these with the lock held.
  [[nodiscard]] Entries::iterator find(Clock::time_point deadline, const Expirable& entry);
  void arm();
  void try_to_arm() noexcept;
  void on_timer();

  const std::shared_ptr<Gate> gate_ = std::make_shared<Gate>();
  mutable std::mutex mutex_;
  Entries entries_;
  SpareNodes<Entries> spares_;
  std::optional<asio::steady_timer> timer_;  ///< Gone when closed.
  std::optional<Clock::time_point> armed_;
  bool closed_ = false;
};

/// The operations of a channel that have not ended yet, and the numbers of all.
class OperationRegistry {
 public:
  OperationRegistry(std::shared_ptr<DeadlineQueue> deadlines, std::size_t limit,
                    std::shared_ptr<Logger> logger = std::make_shared<Logger>())
      : deadlines_(std::move(deadlines)), limit_(limit), logger_(std::move(logger)) {}

  /// @return `errc::closed`, `errc::resource_limit` or `std::errc::not_enough_memory` if the operation wasn't taken.
  [[nodiscard]] std::error_code add(const std::shared_ptr<Operation>& operation);
  void remove(const Operation& operation);
  /// Refuses further operations and asks all pending ones to stop.
  void close(std::error_code cause);
  void wait_until_empty();
  /// Calls `done` when the writes to a peer that have been added by now have ended, wherever they were: with an
  /// operation's thread, with the registry's lock held, or within the call. Its exceptions are lost.
  void when_writes_ended(std::string_view peer_id, std::function<void()> done);
  /// As above, of all operations with the peer up to a number.
  void when_operations_ended(std::string_view peer_id, std::uint64_t last_number, std::function<void()> done);
  /// As `when_writes_ended`, of all operations that have been added by now and `concerned` holds for. It is asked with the
  /// registry's lock held.
  /// @return the number of the last one that had been added.
  std::uint64_t when_ended(std::function<bool(const TransferRequest&)> concerned, std::function<void()> done);
  /// Asks all operations with a peer that have been added by now to stop.
  /// @return the number of the last one: handlers may start others meanwhile.
  std::uint64_t stop(std::string_view peer_id, std::error_code cause);
  /// Asks all pending operations that `concerned` holds for, up to a number, to stop.
  /// @return as above.
  std::uint64_t stop(const std::function<bool(const TransferRequest&)>& concerned, std::error_code cause,
                     std::uint64_t last_number = std::numeric_limits<std::uint64_t>::max());

  /// Sets the function that says what an operation without a link waits for. To be called before there are operations.
  void set_awaited(AwaitedOfPeer describe) { awaited_of_peer_ = std::move(describe); }
  /// Sets the function that is told when an operation without a link has been stopped. Likewise.
  void set_stopped_waiting(StoppedWaiting tell) { stopped_waiting_ = std::move(tell); }
  void stopped_waiting(std::string_view peer_id) const {
    if (stopped_waiting_) {
      stopped_waiting_(peer_id);
    }
  }
  [[nodiscard]] std::string awaited(std::string_view peer_id) const {
    return awaited_of_peer_ ? awaited_of_peer_(peer_id) : std::string();
  }

  [[nodiscard]] TransferCounters& counters() noexcept { return counters_; }
  [[nodiscard]] Logger& logger() noexcept { return *logger_; }
  [[nodiscard]] const std::shared_ptr<Gate>& gate() const noexcept { return deadlines_->gate(); }

 private:
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::size_t limit_;
  const std::shared_ptr<Logger> logger_;
  AwaitedOfPeer awaited_of_peer_;
  StoppedWaiting stopped_waiting_;
  TransferCounters counters_;
  std::mutex mutex_;
  std::condition_variable empty_;
  struct Entry {
    std::shared_ptr<Operation> operation;
    std::uint64_t number = 0;
  };
  std::unordered_map<const Operation*, Entry> pending_;
  SpareNodes<std::unordered_map<const Operation*, Entry>> spares_;
  std::uint64_t last_number_ = 0;
  /// A wait for certain operations up to a number, and how many of them there still are.
  struct Awaited {
    std::function<bool(const TransferRequest&)> concerned;
    std::uint64_t last_number = 0;
    std::size_t left = 0;
    std::function<void()> done;

    [[nodiscard]] bool concerns(const Entry& entry) const {
      return entry.number <= last_number && concerned(entry.operation->request());
    }
  };
  void await(Awaited awaited);
  std::vector<Awaited> awaited_;
  bool closed_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_OPERATION_REGISTRY_HPP
