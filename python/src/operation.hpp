// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/completion_queue.hpp>
#include <kvferry/detail/process.hpp>

#include "released.hpp"

namespace kvferry::python {

namespace nb = nanobind;

/// An operation as Python sees it: what the channel writes to until its end, and the Python objects whose memory it uses.
/// To be used with the GIL; the channel's threads write to the results only, before the handle says that it has ended.
struct Operation {
  using Result = std::variant<std::monostate, std::optional<SideMessage>, PeerInfo, Notification,
                              std::vector<Notification>, PeerEvent>;

  std::string name;
  OperationHandle handle;
  std::string diagnostic;
  std::vector<std::error_code> statuses;
  std::vector<std::size_t> sizes;
  Result result;
  std::vector<nb::object> kept;
  std::shared_ptr<const void> kept_region;  ///< The memory of a region whose pages it uses.
  nb::object user_data = nb::none();
  std::optional<CompletionEntry> end;
  bool handed_over = false;  ///< What it has received is somebody else's.
  /// Where it ends: a queue that is gone would lose its result.
  std::shared_ptr<CompletionQueue> queue;

  /// Looks whether it has ended. What was kept is let go then.
  bool look();
};

/// The one Python object of an operation. Where both keep it, they keep this: then the garbage collector sees each
/// reference once.
[[nodiscard]] nb::object to_object(std::shared_ptr<Operation> operation);

/// Where a Python program's operations end, and what keeps them until then. To be used with the GIL.
class Queue {
 public:
  Queue() = default;
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  /// Operations that are still under way are kept by the process until they have ended.
  ~Queue();

  [[nodiscard]] const std::shared_ptr<CompletionQueue>& native() const noexcept { return queue_; }
  /// @return the number for its token. @throws as `check_process`.
  [[nodiscard]] std::uint64_t add(std::shared_ptr<Operation> operation);
  /// As its destructor does.
  void let_go();
  [[nodiscard]] int traverse(visitproc visit, void* arg) const;
  /// @throws TransferError `errc::forked` in a forked child of the process that made it: nothing ends in it there.
  void check_process() const;
  void forget(std::uint64_t number) { pending_.erase(number); }

  [[nodiscard]] std::size_t pending() const noexcept { return pending_.size(); }
  [[nodiscard]] std::vector<nb::object> drain(std::size_t most);
  /// Sleeps until there are entries. @return whether there are. @throws as `check_process`.
  [[nodiscard]] bool wait(std::optional<double> seconds) const;

 private:
  std::shared_ptr<CompletionQueue> queue_ = std::make_shared<CompletionQueue>();
  ProcessOfOrigin origin_;
  std::unordered_map<std::uint64_t, nb::object> pending_;  ///< `Operation`s.
  std::uint64_t last_ = 0;
};

/// Waits for an operation whose token is of `queue`, which has no other. Whatever is thrown meanwhile, as by a signal's
/// handler, cancels it, and goes on when the operation has ended; the interpreter's exit cancels it, too. Releases the GIL.
void wait_for_end(CompletionQueue& queue, Operation& operation);

/// Lets go of what the ended operations of queues that are gone have kept.
void sweep();

/// @throws TransferError `errc::closed` if the interpreter's exit has begun; other threads than its own get no further.
void refuse_at_exit();

/// Starts an operation and, if there is no queue, waits for it. `start(token)` calls an `async_` function.
/// @param make_token of a queue and a number.
template <class MakeToken, class Start>
std::shared_ptr<Operation> launch(std::shared_ptr<Operation> operation, Queue* queue, MakeToken make_token,
                                  Start start) {
  refuse_at_exit();
  sweep();
  if (queue == nullptr) {
    CompletionQueue own;
    (void)InterpreterExit::descriptor();  // to be waited for: made before there is something to wait for
    operation->handle = start(make_token(own, 0));
    wait_for_end(own, *operation);
    return operation;
  }
  const std::uint64_t number = queue->add(operation);
  try {
    operation->queue = queue->native();
    operation->handle = start(make_token(*queue->native(), number));
  } catch (...) {
    queue->forget(number);
    throw;
  }
  return operation;
}

/// For operations without a result of their own.
template <class Start>
std::shared_ptr<Operation> launch(std::shared_ptr<Operation> operation, Queue* queue, Start start) {
  return launch(
      std::move(operation), queue, [](CompletionQueue& of, std::uint64_t number) { return of.token(number); }, start);
}

/// For operations that end with a `Result`.
template <class Result, class Start>
std::shared_ptr<Operation> launch_for(std::shared_ptr<Operation> operation, Queue* queue, Start start) {
  Result& result = operation->result.template emplace<Result>();
  return launch(
      std::move(operation), queue,
      [&result](CompletionQueue& of, std::uint64_t number) { return of.token(number, result); }, start);
}

void bind_operation(nb::module_& module);

}  // namespace kvferry::python
