// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/base_transfer_channel.hpp>

#include <chrono>
#include <memory>
#include <string_view>

#include "supervisor.hpp"

namespace example {

/// Notices at once that a peer is gone, also while this side only waits for it to act.
///
/// A write that never comes, and a notification that never comes, do not fail. A recv does when its peer goes: so the
/// watch is a recv of something that the peer never sends.
class PeerWatch {
 public:
  /// From here on the supervisor ends the work if the peer goes. Both must outlive the watch.
  PeerWatch(kvferry::BaseTransferChannel& channel, std::string_view peer_id, Supervisor& supervisor);
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;
  /// Stands down and cancels the recv.
  ~PeerWatch();

  /// From here on the peer may go.
  void stand_down();

  /// Waits until the peer has gone, but no longer than this.
  void wait_until_gone(std::chrono::milliseconds limit);

 private:
  struct State;
  std::shared_ptr<State> state_;
  Supervisor& supervisor_;
};

}  // namespace example
