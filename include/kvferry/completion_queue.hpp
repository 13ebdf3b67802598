// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_COMPLETION_QUEUE_HPP
#define KVFERRY_COMPLETION_QUEUE_HPP

#include <asio/async_result.hpp>
#include <asio/cancellation_type.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <type_traits>
#include <utility>

#include <kvferry/completion.hpp>

namespace kvferry::inline KVFERRY_ABI {

namespace detail {
class QueueState;
class QueuedOperation;
}  // namespace detail

/// The end of an operation, as a `CompletionQueue` hands it out.
struct CompletionEntry {
  std::uint64_t user_data = 0;  ///< As given to the token.
  std::error_code error;
  /// Transfers: how many objects were transferred. `async_receive_notifications`: how many came. Others: 0.
  std::size_t count = 0;
};

/// Stands for one operation that was started with a token of a `CompletionQueue`; the initiating function returns it.
/// It may be copied, dropped at any time, and used after the queue and the channel are gone. Thread-safe. In a forked
/// child, a handle of the parent's has no result and cancels nothing.
class KVFERRY_EXPORT OperationHandle {
 public:
  /// A handle of no operation: it never ends and can't be cancelled.
  OperationHandle() = default;

  [[nodiscard]] bool ended() const;
  /// The operation's end; nothing until then. The queue's entry stays in the queue.
  [[nodiscard]] std::optional<CompletionEntry> result() const;
  /// Asks the operation to end. It then ends as usual, perhaps with `errc::cancelled`, perhaps with success. Does
  /// nothing if the operation has ended.
  void cancel() const;

 private:
  template <class Result>
  friend class CompletionToken;
  explicit OperationHandle(std::shared_ptr<detail::QueuedOperation> operation) : operation_(std::move(operation)) {}

  std::shared_ptr<detail::QueuedOperation> operation_;
};

template <class Result>
class CompletionToken;

/// Collects the ends of operations, for a program that has a loop of its own and looks once a step.
///
/// Give a token of the queue to any `async_` function of any channel, in place of a handler. The function returns an
/// `OperationHandle`. When the operation ends, the thread that ends it makes an entry in the queue. No handler runs, no
/// executor is used, and no thread is woken unless one sleeps on the descriptor.
/// @code
/// kvferry::CompletionQueue queue;
/// auto handle = channel.async_batched_write(objects, spec, queue.token(request_number));
/// // Once a step, or when poll(2) says that queue.descriptor() can be read:
/// std::array<kvferry::CompletionEntry, 64> ended;
/// for (const auto& entry : std::span(ended).first(queue.drain(ended))) { finish(entry.user_data, entry.error); }
/// @endcode
///
/// Thread safety: all functions may be called from any thread; destruction must not overlap with them. The queue may be
/// destroyed before its operations end, or while they end. Their entries are then lost, and the places that tokens were
/// given for results are not written any more. The operations go on: their buffers belong to the channel until
/// `OperationHandle::ended`.
///
/// Forked processes: a queue belongs to the process that made it. In a forked child it has no entries, and its
/// destructor touches nothing. Don't poll its descriptor there: it is the parent's. An operation that is given a token
/// of it there has its result only in its handle.
class KVFERRY_EXPORT CompletionQueue {
 public:
  /// @throws TransferError with the errno of eventfd(2).
  CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;
  ~CompletionQueue();

  /// An eventfd, close-on-exec, that is readable while there are entries. Only poll it; `drain` resets it. It is
  /// written once when the first entry comes, not for each entry.
  [[nodiscard]] int descriptor() const noexcept;

  /// Takes the oldest entries out. Never blocks.
  /// @return how many entries were taken. If they are fewer than the size of `entries`, none is left.
  [[nodiscard]] std::size_t drain(std::span<CompletionEntry> entries);

  /// As `drain`, but sleeps until there is an entry, for programs whose loop has nothing else to wait for.
  /// @param timeout unset: without end; 0 or less: doesn't sleep.
  /// @return 0 if the time passed without an entry; at once if `entries` is empty, and in a forked child.
  [[nodiscard]] std::size_t wait(std::span<CompletionEntry> entries, std::optional<std::chrono::milliseconds> timeout = {});

  /// Makes a token for operations that end with an error, with an error and a count, or with an error and the answer to
  /// a side message. The answer is dropped.
  [[nodiscard]] CompletionToken<void> token(std::uint64_t user_data);
  /// Makes a token for operations with another result. They store it in `result`, which must stay valid until the
  /// operation has ended or the queue is gone. After a failure it is empty, or has the part that came before the
  /// failure.
  template <class Result>
  [[nodiscard]] CompletionToken<Result> token(std::uint64_t user_data, Result& result);

 private:
  const std::shared_ptr<detail::QueueState> state_;
};

namespace detail {

/// Moves a value to where a token's result is.
using StoreResult = void (*)(void* result, void* value);

/// Makes an operation that becomes an entry of the queue at its end. Ending it allocates nothing.
[[nodiscard]] KVFERRY_EXPORT std::shared_ptr<QueuedOperation> make_queued_operation(std::shared_ptr<QueueState> queue,
                                                                                    std::uint64_t user_data);
/// @param store called with `result` and `value` before the entry is handed out, unless it is null or the queue is gone.
KVFERRY_EXPORT void end_queued_operation(const std::shared_ptr<QueuedOperation>& operation, std::error_code error,
                                         std::size_t count, StoreResult store, void* result, void* value) noexcept;
KVFERRY_EXPORT void set_cancel(QueuedOperation& operation, std::function<void(asio::cancellation_type)> cancel);

/// Ends an operation of a queue. Runs inside the call that completes the operation: it takes the queue's lock, and may
/// write to the descriptor.
class QueueHandlerBase {
 public:
  using completes_directly = void;

  explicit QueueHandlerBase(std::shared_ptr<QueuedOperation> operation) : operation_(std::move(operation)) {}

  void on_cancel(std::function<void(asio::cancellation_type)> cancel) { set_cancel(*operation_, std::move(cancel)); }
  [[nodiscard]] bool cancellable() const noexcept { return true; }

 protected:
  void end(std::error_code error, std::size_t count, StoreResult store = nullptr, void* result = nullptr,
           void* value = nullptr) noexcept {
    end_queued_operation(operation_, error, count, store, result, value);
  }

 private:
  std::shared_ptr<QueuedOperation> operation_;
};

template <class Result>
class QueueHandler : public QueueHandlerBase {
 public:
  QueueHandler(std::shared_ptr<QueuedOperation> operation, Result* result)
      : QueueHandlerBase(std::move(operation)), result_(result) {}

  void operator()(std::error_code error, Result value) {
    std::size_t count = 0;
    if constexpr (requires {
                    typename Result::value_type;
                    value.size();
                  }) {
      count = value.size();
    }
    end(
        error, count, [](void* to, void* from) { *static_cast<Result*>(to) = std::move(*static_cast<Result*>(from)); },
        result_, &value);
  }

 private:
  Result* result_;
};

template <>
class QueueHandler<void> : public QueueHandlerBase {
 public:
  QueueHandler(std::shared_ptr<QueuedOperation> operation, void*) : QueueHandlerBase(std::move(operation)) {}

  void operator()(std::error_code error) { end(error, 0); }
  void operator()(std::error_code error, std::size_t count) { end(error, count); }
  void operator()(std::error_code error, const std::optional<SideMessage>&) { end(error, 0); }
};

}  // namespace detail

/// A completion token of Asio's, made by `CompletionQueue::token`. Use it once, in the expression that made it.
template <class Result>
class CompletionToken {
 public:
  CompletionToken(std::shared_ptr<detail::QueueState> queue, std::uint64_t user_data, Result* result)
      : queue_(std::move(queue)), user_data_(user_data), result_(result) {}

  /// For Asio's use.
  template <class Initiation, class... Args>
  [[nodiscard]] OperationHandle initiate(Initiation&& initiation, Args&&... args) {
    auto operation = detail::make_queued_operation(std::move(queue_), user_data_);
    OperationHandle handle(operation);
    std::forward<Initiation>(initiation)(detail::QueueHandler<Result>(std::move(operation), result_),
                                         std::forward<Args>(args)...);
    return handle;
  }

 private:
  std::shared_ptr<detail::QueueState> queue_;
  std::uint64_t user_data_;
  Result* result_;
};

inline CompletionToken<void> CompletionQueue::token(std::uint64_t user_data) { return {state_, user_data, nullptr}; }

template <class Result>
CompletionToken<Result> CompletionQueue::token(std::uint64_t user_data, Result& result) {
  return {state_, user_data, &result};
}

}  // namespace kvferry

/// @cond
template <class Result, class... Results>
class asio::async_result<kvferry::CompletionToken<Result>, void(std::error_code, Results...)> {
 public:
  using return_type = kvferry::OperationHandle;

  template <class Initiation, class... Args>
  static return_type initiate(Initiation&& initiation, kvferry::CompletionToken<Result> token, Args&&... args) {
    static_assert(std::is_invocable_v<kvferry::detail::QueueHandler<Result>, std::error_code, Results...>,
                  "the operation has a result: give the token a place for it, queue.token(user_data, result)");
    return token.initiate(std::forward<Initiation>(initiation), std::forward<Args>(args)...);
  }
};
/// @endcond

#endif  // KVFERRY_COMPLETION_QUEUE_HPP
