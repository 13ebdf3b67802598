// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_CHANNEL_REQUESTS_HPP
#define KVFERRY_CHANNEL_REQUESTS_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/completion.hpp>
#include <kvferry/config.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Describes a connected peer.
struct PeerInfo {
  std::string id;
  std::uint64_t incarnation = 0;  ///< Drawn anew at each start of the peer's channel.
  std::string init_url;           ///< The url at which the peer answers handshakes; empty if the peer hasn't told it.
  /// The peer's regions that this side has heard of, ordered by number, without the removed ones.
  std::vector<RemoteRegion> regions;
  std::string path;  ///< How the bytes travel, for people: "tcp 10.0.0.1:40112 -> 10.0.0.2:5601, 2 lanes, cubic".
};

/// Ends a `connect` by metadata.
using ConnectCompletion = CompletionHandler<void(std::error_code, PeerInfo)>;

/// A `connect` by metadata as a transport gets it.
struct ConnectRequest {
  std::string local_id;
  std::vector<std::byte> metadata;
  std::optional<std::chrono::milliseconds> timeout;
  std::string* diagnostic = nullptr;
};

/// A handshake as a transport gets it.
struct InitRequest {
  std::string local_id;
  std::string peer_id;
  std::string peer_init_url;
  std::optional<SideMessage> side_message;
  std::optional<std::chrono::milliseconds> timeout;
  std::string* diagnostic = nullptr;
};

}  // namespace kvferry

#endif  // KVFERRY_CHANNEL_REQUESTS_HPP
