// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_OPERATION_HPP
#define KVFERRY_KIT_OPERATION_HPP

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>

#include <kvferry/completion.hpp>
#include <kvferry/config.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

using Clock = std::chrono::steady_clock;

/// Now and `timeout`, without overflow: less than nothing is now, more than a year is a year.
[[nodiscard]] KVFERRY_EXPORT Clock::time_point deadline_after(std::chrono::milliseconds timeout) noexcept;

class Link;
class OperationRegistry;
class StripedOperation;
struct PeerCounters;

/// Something that must end by a deadline.
class KVFERRY_EXPORT Expirable {
 public:
  virtual ~Expirable() = default;
  /// The deadline has passed. Called at most once, on the channel's executor, with no lock held; if it throws
  /// `std::bad_alloc`, once more a while later.
  virtual void expire() = 0;
};

/// One transfer on its way: the request, its deadline, the objects that have landed so far, and its completion, which
/// is called exactly once. The kit makes it, checks it, and hands it to the peer's `Link`, which reports landings and
/// finishes it.
///
/// Thread safety: all functions may be called from any thread; `landed` and `failed` for distinct objects at a time.
class KVFERRY_EXPORT Operation final : public Expirable, public std::enable_shared_from_this<Operation> {
 public:
  Operation(TransferRequest request, Completion completion, Clock::time_point deadline,
            std::shared_ptr<OperationRegistry> registry);

  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
  ~Operation() override;

  [[nodiscard]] const TransferRequest& request() const noexcept { return request_; }
  [[nodiscard]] std::size_t object_count() const noexcept { return request_.objects.size(); }
  [[nodiscard]] Clock::time_point started() const noexcept { return started_; }
  [[nodiscard]] Clock::time_point deadline() const noexcept { return deadline_; }

  /// Objects `[first, first + count)` are in the destination's memory, whole.
  void landed(std::size_t first, std::size_t count) noexcept;
  /// Object `index` won't be transferred, though the rest may be.
  void failed(std::size_t index, std::error_code cause) noexcept;
  /// Resets all objects, as if nothing had landed or failed: the whole operation starts again.
  void start_over() noexcept;
  /// Recv: object `index` is in its buffer and has `bytes` bytes, which may be less than the buffer.
  void received(std::size_t index, std::size_t bytes) noexcept;
  /// Recv: object `index`, of which nothing is in its buffer, has `bytes` bytes.
  void set_size(std::size_t index, std::size_t bytes) noexcept;

  /// Ends the operation: fills in statuses and diagnostic and posts the handler. Call it when nothing touches the
  /// buffers any more. Only the first call counts. Success with a failed object ends with that object's error.
  void finish(std::error_code cause, std::string diagnostic = {});

  /// Asks the operation to end, because of a deadline, a cancellation or a close: the link stops using the buffers and
  /// calls `finish`. Only the first cause counts, unless the link throws: then the next one does, and the link is told
  /// again.
  void request_stop(std::error_code cause);

  [[nodiscard]] bool finished() const noexcept { return finished_; }

  /// The incarnation of the peer for which the operation was started, as the kit's number of that incarnation. The
  /// first call sets it; later calls return it.
  std::uint64_t mean_for(std::uint64_t instance) noexcept;

  /// Makes the operation's end count for its peer as well, unless it has ended already. At most once.
  void count_for(std::shared_ptr<PeerCounters> counters) noexcept;

  /// The reason why the operation has to end; no error if it doesn't have to.
  [[nodiscard]] std::error_code stop_cause() const {
    return stop_asked_.load(std::memory_order_acquire) ? locked_stop_cause() : std::error_code();
  }

  /// Hands the operation to a link; if it has to end already, it ends instead. If the link throws, the operation ends
  /// with that error when no part of it is under way.
  void start_on(const std::shared_ptr<Link>& link);

  /// Routes the handler's cancellation slot here; within the initiating call only.
  void accept_cancellation();

  void expire() override;

 private:
  friend class StripedOperation;

  /// @param stopped its caller doesn't wait any longer.
  void finish(std::error_code cause, std::string diagnostic, bool stopped);
  [[nodiscard]] std::error_code locked_stop_cause() const;
  void describe_failure(std::error_code cause, std::string diagnostic, std::size_t transferred) noexcept;
  void count_landed(std::size_t first, std::size_t count, std::uint64_t bytes) noexcept;

  TransferRequest request_;
  Completion completion_;
  const Clock::time_point deadline_;
  const std::shared_ptr<OperationRegistry> registry_;

  const Clock::time_point started_ = Clock::now();
  std::atomic<std::size_t> landed_{0};
  std::atomic<std::uint64_t> landed_bytes_{0};
  std::atomic<bool> finished_{false};
  std::atomic<bool> in_parts_{false};  ///< From here on it ends with its last part: StripedOperation.
  std::atomic<std::uint64_t> meant_for_{0};
  std::atomic<bool> stop_asked_{false};  ///< There is a `stop_cause_`.

  std::atomic<bool> object_failed_{false};  ///< There is a `first_object_error_`.
  std::atomic<bool> counted_{false};        ///< There are `peer_counters_`, which don't change any more.
  std::shared_ptr<PeerCounters> peer_counters_;

  mutable std::mutex mutex_;
  std::weak_ptr<Link> link_;
  bool on_link_ = false;
  std::error_code stop_cause_;
  bool stops_again_ = false;  ///< The link was told in part, or not at all.
  std::error_code first_object_error_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_OPERATION_HPP
