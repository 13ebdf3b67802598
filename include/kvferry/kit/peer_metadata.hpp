// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PEER_METADATA_HPP
#define KVFERRY_KIT_PEER_METADATA_HPP

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <tuple>

#include <kvferry/kit/link.hpp>
#include <kvferry/side_message.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/init_messages.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The message of `local_metadata` and `connect`: the place to ask for a handshake. docs/wire_protocol.md has the
/// fields.
struct PeerMetadata {
  std::uint64_t version = protocol_version;
  std::string transport;
  std::string id;
  std::uint64_t incarnation = 0;
  std::string init_url;

  static constexpr std::string_view side_message_type = "KvferryMetadata";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("version", &PeerMetadata::version),
                      side_message_field("transport", &PeerMetadata::transport),
                      side_message_field("id", &PeerMetadata::id),
                      side_message_field("incarnation", &PeerMetadata::incarnation),
                      side_message_field("init_url", &PeerMetadata::init_url));
  }
};

/// The metadata of a channel that has this id. @param init_url where others reach it; empty if nowhere.
/// @throws TransferError as `BaseTransferChannel::local_metadata`.
[[nodiscard]] Bytes write_metadata(std::string_view transport, std::string_view id, std::uint64_t incarnation,
                                   const std::string& init_url);

/// Reads bytes that came by any road. The id and the url in them are checked where they are used, as a call's arguments
/// are. @param failure why these bytes are no metadata for a channel of this transport.
[[nodiscard]] PeerMetadata read_metadata(std::span<const std::byte> bytes, std::string_view transport,
                                         Failure& failure);

/// Metadata is of one incarnation, and another is at its url.
[[nodiscard]] Failure another_incarnation(std::uint64_t expected, std::uint64_t found);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PEER_METADATA_HPP
