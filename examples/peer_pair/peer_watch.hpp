// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/base_transfer_channel.hpp>

#include <chrono>
#include <memory>
#include <string_view>

#include "supervisor.hpp"

namespace example {

/// Ends the work when a peer is gone, also while this side only waits for it to act: a write or a notification that never
/// comes does not fail.
class PeerWatch {
 public:
  /// From here on the supervisor ends the work if the peer goes. Both must outlive the watch.
  PeerWatch(kvferry::BaseTransferChannel& channel, std::string_view peer_id, Supervisor& supervisor);
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;
  /// Stands down and cancels the wait.
  ~PeerWatch();

  /// From here on the peer may go.
  void stand_down();

  /// Waits until the peer has gone, but no longer than this.
  void wait_until_gone(std::chrono::milliseconds limit);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace example
