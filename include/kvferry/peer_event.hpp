// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_PEER_EVENT_HPP
#define KVFERRY_PEER_EVENT_HPP

#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>

namespace kvferry::inline KVFERRY_ABI {

/// The kind of an event of a peer.
enum class PeerEventKind : std::uint8_t {
  connected,  ///< There is a usable connection: the first one, or one to the same incarnation as before.
  gone,       ///< The connection has ended.
  restarted,  ///< There is a usable connection, to another incarnation than before: agree on page indexes anew.
};

[[nodiscard]] constexpr std::string_view to_string(PeerEventKind kind) noexcept {
  switch (kind) {
    case PeerEventKind::connected: return "connected";
    case PeerEventKind::gone: return "gone";
    case PeerEventKind::restarted: return "restarted";
  }
  return "unknown";
}

/// An event of a peer, whichever side connected. The events of one peer come in the order in which they happened.
///
/// A connection may be replaced before its end is noticed: `connected` then follows `connected`, and `restarted` may
/// follow either. So `connected` and `restarted` describe the present state, and may come without a `gone` before them.
struct PeerEvent {
  PeerEventKind kind = PeerEventKind::connected;
  std::string peer_id;
  /// Connected and restarted: the incarnation that is connected now. Gone: the one that was connected.
  std::uint64_t incarnation = 0;
  /// Gone: `errc::peer_closed` if the peer closed its channel or disconnected, `errc::cancelled` if this side
  /// disconnected, else why the connection broke. Restarted: `errc::peer_restarted`. Connected: none.
  std::error_code cause;
  /// How many older events were dropped before this one, because nobody took them
  /// (`ChannelOptions::max_pending_peer_events`). If it isn't 0, ask `BaseTransferChannel::peers()` for the connected
  /// peers.
  std::uint64_t missed = 0;
};

}  // namespace kvferry

#endif  // KVFERRY_PEER_EVENT_HPP
