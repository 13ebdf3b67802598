// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/peer_metadata.hpp>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/text.hpp>

#include <kvferry/kit/checks.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// More than any metadata has: an id, a url, and some numbers.
inline constexpr std::size_t max_metadata_bytes = 1024;

}  // namespace internal

KVFERRY_INLINE Bytes write_metadata(std::string_view transport, std::string_view id, std::uint64_t incarnation,
                                    const std::string& init_url) {
  if (const Failure wrong = check_id(id, "the local")) {
    throw TransferError(wrong.code, "local_metadata: " + wrong.sentence);
  }
  if (init_url.empty()) {
    throw TransferError(errc::not_supported,
                        "local_metadata: this channel answers no handshakes at an address that others could use; set "
                        "peer_init_url, and advertised_init_url where that is a wildcard");
  }
  const PeerMetadata metadata{protocol_version, std::string(transport), std::string(id), incarnation, init_url};
  return encode_side_message(metadata).encoded();
}

KVFERRY_INLINE PeerMetadata read_metadata(std::span<const std::byte> bytes, std::string_view transport,
                                          Failure& failure) {
  if (bytes.size() > max_metadata_bytes) {
    failure = {errc::malformed_message,
               "metadata of " + std::to_string(bytes.size()) + " bytes, at most " + std::to_string(max_metadata_bytes)};
    return {};
  }
  PeerMetadata metadata;
  try {
    const SideMessage message = parse_side_message(bytes);
    if (!message.is<PeerMetadata>()) {
      failure = {errc::malformed_message,
                 "metadata of type " + in_quotes(message.type()) + ", expected 'KvferryMetadata'"};
      return {};
    }
    metadata = decode_side_message<PeerMetadata>(message);
  } catch (const TransferError& error) {
    failure = {error.code(), "metadata: " + std::string(error.what())};
    return {};
  }
  if (metadata.version != protocol_version) {
    failure = {errc::version_mismatch, "metadata of protocol version " + std::to_string(metadata.version) +
                                           ", this channel speaks " + std::to_string(protocol_version)};
  } else if (metadata.transport != transport) {
    failure = {errc::transport_mismatch, "metadata of transport " + in_quotes(metadata.transport) +
                                             ", this channel's is " + in_quotes(transport)};
  } else if (metadata.incarnation == 0) {
    failure = {errc::malformed_message, "metadata of incarnation 0, which no channel is"};
  }
  return metadata;
}

KVFERRY_INLINE Failure another_incarnation(std::uint64_t expected, std::uint64_t found) {
  return {errc::peer_restarted, "the metadata is of incarnation " + std::to_string(expected) +
                                    ", and who answers is incarnation " + std::to_string(found)};
}

}  // namespace kvferry::kit
