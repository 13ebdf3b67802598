// SPDX-License-Identifier: Apache-2.0
#include "peer_watch.hpp"

#include <fmt/core.h>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <system_error>

namespace example {

/// The state that the handlers keep alive.
struct PeerWatch::State : std::enable_shared_from_this<State> {
  State(kvferry::BaseTransferChannel& of, std::string_view peer_id, Supervisor& by)
      : channel(of), peer(peer_id), supervisor(by) {
    if (const auto info = channel.peer_info(peer)) {
      incarnation = info->incarnation;
    }
  }

  // Cancelling and completing happen on one thread, the supervisor's, as Asio asks of the users of a cancellation slot.
  void wait() {
    channel.async_wait_peer_event(
        {}, asio::bind_cancellation_slot(
                cancel.slot(),
                asio::bind_executor(supervisor.get_executor(),
                                    [self = shared_from_this()](std::error_code ec, const kvferry::PeerEvent& event) {
                                      self->take(ec, event);
                                    })));
  }

  void take(std::error_code ec, const kvferry::PeerEvent& event) {
    if (!ec && !is_end(event)) {
      wait();
      return;
    }
    if (!peer_may_go && ec != kvferry::condition::cancelled) {
      supervisor.end(ExitCode::transfer_failed, fmt::format("{} is gone: {}", peer, (ec ? ec : event.cause).message()));
    }
    gone.set_value();
  }

  /// Events of an earlier process with the same id may still be there.
  [[nodiscard]] bool is_end(const kvferry::PeerEvent& event) {
    if (event.peer_id != peer) {
      return false;
    }
    if (event.kind == kvferry::PeerEventKind::gone) {
      return event.incarnation == incarnation;
    }
    if (!incarnation) {
      incarnation = event.incarnation;
    }
    return false;
  }

  kvferry::BaseTransferChannel& channel;
  const std::string peer;
  std::optional<std::uint64_t> incarnation;  ///< Of the process that is watched.
  Supervisor& supervisor;
  std::atomic<bool> peer_may_go{false};
  asio::cancellation_signal cancel;
  std::promise<void> gone;
};

PeerWatch::PeerWatch(kvferry::BaseTransferChannel& channel, std::string_view peer_id, Supervisor& supervisor)
    : state_(std::make_shared<State>(channel, peer_id, supervisor)) {
  state_->wait();
}

PeerWatch::~PeerWatch() {
  stand_down();
  asio::post(state_->supervisor.get_executor(),
             [state = state_] { state->cancel.emit(asio::cancellation_type::terminal); });
}

void PeerWatch::stand_down() { state_->peer_may_go = true; }

void PeerWatch::wait_until_gone(std::chrono::milliseconds limit) { state_->gone.get_future().wait_for(limit); }

}  // namespace example
