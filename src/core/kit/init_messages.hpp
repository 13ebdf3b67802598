// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <kvferry/memory_region.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::kit {

inline constexpr std::uint64_t protocol_version = 2;

/// A region in the handshake: size, page size, access.
using RegionTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

/// kvferry's handshake, question. docs/wire_protocol.md describes the fields.
struct InitQuestion {
  std::uint64_t version = protocol_version;
  std::string transport;
  std::string sender_id;
  std::string receiver_id;
  std::uint64_t incarnation = 0;
  std::string init_url;
  std::vector<RegionTuple> regions;
  Bytes endpoint;

  static constexpr std::string_view side_message_type = "KvferryInitRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("version", &InitQuestion::version),
                      side_message_field("transport", &InitQuestion::transport),
                      side_message_field("sender_id", &InitQuestion::sender_id),
                      side_message_field("receiver_id", &InitQuestion::receiver_id),
                      side_message_field("incarnation", &InitQuestion::incarnation),
                      side_message_field("init_url", &InitQuestion::init_url),
                      side_message_field("regions", &InitQuestion::regions),
                      side_message_field("endpoint", &InitQuestion::endpoint));
  }
};

/// kvferry's handshake, answer.
struct InitAnswer {
  static constexpr std::string_view ok = "ok";
  /// The answering side is connecting to the asking one at this moment, and its attempt is the one that counts.
  static constexpr std::string_view yield = "yield";

  std::uint64_t version = protocol_version;
  std::string status;
  std::string transport;
  std::uint64_t incarnation = 0;
  std::vector<RegionTuple> regions;
  Bytes endpoint;

  static constexpr std::string_view side_message_type = "KvferryInitResponse";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("version", &InitAnswer::version),
                      side_message_field("status", &InitAnswer::status),
                      side_message_field("transport", &InitAnswer::transport),
                      side_message_field("incarnation", &InitAnswer::incarnation),
                      side_message_field("regions", &InitAnswer::regions),
                      side_message_field("endpoint", &InitAnswer::endpoint));
  }
};

}  // namespace kvferry::kit
