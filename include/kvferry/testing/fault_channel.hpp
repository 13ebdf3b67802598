// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/steady_timer.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/kit/gate.hpp>
#include <kvferry/kit/logger.hpp>

#include <kvferry/testing/decorated_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// A channel around another one, with faults at chosen transfers, for tests of a program that uses channels. Without
/// faults it behaves like the other channel.
///
/// A fault's number counts transfers (write, read, send, recv) from the call that sets the fault; 1 is the next one.
/// Each fault happens once. A later fault for the same transfer replaces the earlier one.
/// @code
/// kvferry::testing::FaultChannel channel(std::make_unique<kvferry::TcpTransferChannel>(options));
/// channel.fail(2, make_error_code(kvferry::errc::connection_lost));
/// server.use(channel);  // its second transfer fails
/// @endcode
///
/// Thread safety: as a channel's.
class FaultChannel final : public DecoratedChannel {
 public:
  /// @param default_timeout for dropped transfers whose spec has no timeout.
  explicit FaultChannel(std::unique_ptr<BaseTransferChannel> inner,
                        std::chrono::milliseconds default_timeout = std::chrono::seconds(30))
      : DecoratedChannel(std::move(inner)), default_timeout_(default_timeout) {
    state_->channel = this;
  }
  ~FaultChannel() override { close(); }

  /// The `nth` transfer ends with `error`. Nothing of it is sent.
  void fail(std::size_t nth, std::error_code error) { plan(nth, {.kind = Kind::fail, .error = error}); }
  /// The `nth` transfer starts late. Its timeout counts from the call, so it may be over by then.
  void delay(std::size_t nth, std::chrono::milliseconds by) { plan(nth, {.kind = Kind::delay, .by = by}); }
  /// The `nth` transfer is dropped: nothing of it is sent, and it ends at its timeout, as if the peer didn't answer.
  void drop(std::size_t nth) { plan(nth, {.kind = Kind::drop}); }
  /// The connection to the peer of the `nth` transfer is cut as soon as that has started.
  void cut(std::size_t nth) { plan(nth, {.kind = Kind::cut}); }
  /// The other channel is closed as soon as the `nth` transfer has started: all operations under way end.
  void kill(std::size_t nth) { plan(nth, {.kind = Kind::kill}); }

  /// The number of transfers that were started so far, with faults and without.
  [[nodiscard]] std::size_t transfers() const {
    const std::lock_guard lock(state_->mutex);
    return state_->started;
  }
  /// Faults that have not happened yet.
  [[nodiscard]] std::size_t faults_left() const {
    const std::lock_guard lock(state_->mutex);
    return state_->faults.size();
  }

  void close() override {
    kit::refuse_in_log_sink("close()");
    std::set<std::shared_ptr<Held>> held;
    {
      const std::lock_guard lock(state_->mutex);
      state_->channel = nullptr;
      held.swap(state_->held);
    }
    for (const auto& transfer : held) {
      end(*transfer, errc::closed);
    }
    DecoratedChannel::close();
  }

 protected:
  void start_transfer(TransferRequest request, Completion completion) override {
    const std::string peer = request.peer_id;
    const Fault fault = next_fault();
    switch (fault.kind) {
      case Kind::fail: end_with(request, completion, fault.error); break;
      case Kind::delay:
      case Kind::drop: hold(std::move(request), std::move(completion), fault); break;
      case Kind::none:
      case Kind::cut:
      case Kind::kill: DecoratedChannel::start_transfer(std::move(request), std::move(completion)); break;
    }
    if (fault.kind == Kind::cut) {
      inner().async_disconnect(peer, [](std::error_code) {});
    } else if (fault.kind == Kind::kill) {
      inner().close();
    }
  }

 private:
  enum class Kind { none, fail, delay, drop, cut, kill };

  struct Fault {
    Kind kind = Kind::none;
    std::error_code error = {};
    std::chrono::milliseconds by{0};
  };

  /// A transfer that the other channel doesn't have yet, or never gets.
  struct Held {
    Held(TransferRequest held_request, Completion held_completion, const asio::any_io_executor& executor)
        : request(std::move(held_request)), completion(std::move(held_completion)), timer(executor) {}

    TransferRequest request;
    std::mutex mutex;  ///< For what follows.
    Completion completion;
    asio::steady_timer timer;
  };

  /// Shared with timers and cancellation slots, which may outlive the channel.
  struct State {
    std::mutex mutex;
    FaultChannel* channel = nullptr;  ///< Null once it is closed.
    std::size_t started = 0;
    std::map<std::size_t, Fault> faults;
    std::set<std::shared_ptr<Held>> held;
  };

  void plan(std::size_t nth, Fault fault) {
    const std::lock_guard lock(state_->mutex);
    state_->faults[state_->started + nth] = fault;
  }

  [[nodiscard]] Fault next_fault() {
    const std::lock_guard lock(state_->mutex);
    const auto planned = state_->faults.extract(++state_->started);
    return planned.empty() ? Fault{} : planned.mapped();
  }

  /// Keeps a transfer until it starts, times out, is cancelled, or the channel is closed.
  void hold(TransferRequest request, Completion completion, const Fault& fault) {
    const auto timeout = std::max(request.timeout.value_or(default_timeout_), std::chrono::milliseconds(0));
    const bool starts = fault.kind == Kind::delay && fault.by < timeout;
    if (starts && request.timeout) {
      request.timeout = timeout - fault.by;
    }
    const auto held = std::make_shared<Held>(std::move(request), std::move(completion), get_executor());
    held->completion.on_cancel(
        kit::cancellation(gate(), std::weak_ptr(held), [](Held& cancelled) { end(cancelled, errc::cancelled); }));
    const std::unique_lock lock(state_->mutex);
    if (state_->channel == nullptr) {
      end(*held, errc::closed);
      return;
    }
    state_->held.insert(held);
    const std::lock_guard held_lock(held->mutex);
    held->timer.expires_after(starts ? fault.by : timeout);
    held->timer.async_wait([state = state_, weak = std::weak_ptr(held), starts](std::error_code) {
      if (const auto due = weak.lock()) {
        time_is_up(*state, due, starts);
      }
    });
  }

  static void time_is_up(State& state, const std::shared_ptr<Held>& held, bool starts) {
    // Held for as long as the channel is used: `close` waits for that.
    const std::lock_guard lock(state.mutex);
    state.held.erase(held);
    if (!starts || state.channel == nullptr) {
      end(*held, errc::timed_out);
      return;
    }
    Completion completion;
    {
      const std::lock_guard held_lock(held->mutex);
      completion = std::exchange(held->completion, {});
    }
    if (completion) {
      state.channel->DecoratedChannel::start_transfer(std::move(held->request), std::move(completion));
    }
  }

  /// Does nothing if it has ended or started already.
  static void end(Held& held, std::error_code cause) {
    Completion completion;
    {
      const std::lock_guard lock(held.mutex);
      completion = std::exchange(held.completion, {});
      held.timer.cancel();
    }
    if (completion) {
      end_with(held.request, completion, cause);
    }
  }

  static void end_with(const TransferRequest& request, Completion& completion, std::error_code error) {
    std::ranges::fill(request.statuses, error);
    if (request.diagnostic != nullptr) {
      *request.diagnostic = "a fault that a test asked for: " + error.message();
    }
    completion(error, 0);
  }

  const std::chrono::milliseconds default_timeout_;
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace kvferry::testing
