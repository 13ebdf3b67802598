// SPDX-License-Identifier: Apache-2.0
#include "peer_watch.hpp"

#include <fmt/core.h>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <cstddef>
#include <future>
#include <string>
#include <system_error>

#include "messages.hpp"

namespace example {

/// What the recv's handler keeps alive.
struct PeerWatch::State {
  std::byte never_received{};
  std::atomic<bool> peer_may_go{false};
  asio::cancellation_signal cancel;
  std::promise<void> gone;
};

PeerWatch::PeerWatch(kvferry::BaseTransferChannel& channel, std::string_view peer_id, Supervisor& supervisor)
    : state_(std::make_shared<State>()), supervisor_(supervisor) {
  kvferry::TransferSpec spec;
  spec.peer_id = peer_id;
  spec.tag = tag_never_sent;
  spec.timeout = std::chrono::hours(24 * 365);
  auto on_end = [state = state_, peer = std::string(peer_id), &supervisor](std::error_code ec, std::size_t) {
    if (!state->peer_may_go && ec != kvferry::condition::cancelled) {
      supervisor.end(ExitCode::transfer_failed, fmt::format("{} is gone: {}", peer, ec.message()));
    }
    state->gone.set_value();
  };
  // Cancelling and completing happen on one thread, the supervisor's, as Asio asks of the users of a cancellation slot.
  channel.async_batched_recv(
      {kvferry::MutableBuffer(&state_->never_received, 1)}, spec,
      asio::bind_cancellation_slot(state_->cancel.slot(),
                                   asio::bind_executor(supervisor.get_executor(), std::move(on_end))));
}

PeerWatch::~PeerWatch() {
  stand_down();
  asio::post(supervisor_.get_executor(), [state = state_] { state->cancel.emit(asio::cancellation_type::terminal); });
}

void PeerWatch::stand_down() { state_->peer_may_go = true; }

void PeerWatch::wait_until_gone(std::chrono::milliseconds limit) { state_->gone.get_future().wait_for(limit); }

}  // namespace example
