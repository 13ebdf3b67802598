// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_INIT_MESSAGES_HPP
#define KVFERRY_KIT_INIT_MESSAGES_HPP

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <kvferry/memory_region.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

inline constexpr std::uint64_t protocol_version = 3;

/// A region in the handshake: size, page size, access.
using RegionTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

/// The first question to a url at which no kvferry channel has answered yet. LMCache's listener answers it, and skips
/// the key that it doesn't know. A message that it doesn't know would leave it stuck for good.
struct Greeting {
  std::string peer_init_url;
  std::optional<std::uint64_t> kvferry;  ///< The protocol version. Not there: LMCache asks.

  static constexpr std::string_view side_message_type = "PySocketInitRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("peer_init_url", &Greeting::peer_init_url),
                      side_message_field("kvferry", &Greeting::kvferry));
  }
};

/// The answer of a kvferry channel to a `Greeting`.
struct GreetingAnswer {
  std::string status;
  std::optional<std::uint64_t> kvferry;  ///< The protocol version. Not there: LMCache answers.

  static constexpr std::string_view side_message_type = "PySocketInitResponse";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("status", &GreetingAnswer::status),
                      side_message_field("kvferry", &GreetingAnswer::kvferry));
  }
};

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
  // Optional, so that the messages of another version can be read far enough to be told so.
  std::optional<Bytes> secret;              ///< By it this peer recognises the sender.
  std::optional<std::uint64_t> timeout_ms;  ///< The remaining time of the sender's attempt.
  std::optional<bool> who;                  ///< Only asks which channel answers; no connection.
  std::optional<std::uint64_t> fenced_us;   ///< How long ago the sender's last fence of this peer was.
  /// Of the regions, ascending. Not there: 0, 1, 2, ...
  std::optional<std::vector<std::uint64_t>> region_numbers;
  std::optional<std::uint64_t>
      next_region;  ///< The number that the next region gets. Not there: one more than the last.
  std::optional<std::uint64_t> given_regions;  ///< How many the channel was made with. Not there: all that it ever had.
  std::optional<std::uint64_t> attempt;        ///< A later attempt of the sender's has a greater number.

  static constexpr std::string_view side_message_type = "KvferryInitRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(
        side_message_field("version", &InitQuestion::version),
        side_message_field("transport", &InitQuestion::transport),
        side_message_field("sender_id", &InitQuestion::sender_id),
        side_message_field("receiver_id", &InitQuestion::receiver_id),
        side_message_field("incarnation", &InitQuestion::incarnation),
        side_message_field("init_url", &InitQuestion::init_url), side_message_field("regions", &InitQuestion::regions),
        side_message_field("endpoint", &InitQuestion::endpoint), side_message_field("secret", &InitQuestion::secret),
        side_message_field("timeout_ms", &InitQuestion::timeout_ms), side_message_field("who", &InitQuestion::who),
        side_message_field("fenced_us", &InitQuestion::fenced_us),
        side_message_field("region_numbers", &InitQuestion::region_numbers),
        side_message_field("next_region", &InitQuestion::next_region),
        side_message_field("given_regions", &InitQuestion::given_regions),
        side_message_field("attempt", &InitQuestion::attempt));
  }
};

/// kvferry's handshake, answer.
struct InitAnswer {
  static constexpr std::string_view ok = "ok";
  /// The answering side is connecting to the asking one at this moment, and its attempt is the one that counts.
  static constexpr std::string_view yield = "yield";
  /// To a question that only asked who answers.
  static constexpr std::string_view here = "here";

  std::uint64_t version = protocol_version;
  std::string status;
  std::string transport;
  std::uint64_t incarnation = 0;
  std::vector<RegionTuple> regions;
  Bytes endpoint;
  /// As in the question. In an answer to `who`: only to somebody who is known again.
  std::optional<Bytes> secret;
  std::optional<std::uint64_t> timeout_ms;  ///< How long the answering side waits for its part of the attempt.
  std::optional<std::uint64_t> fenced_us;   ///< How long ago the answering side's last fence of this peer was.
  std::optional<std::vector<std::uint64_t>> region_numbers;  ///< As in the question.
  std::optional<std::uint64_t> next_region;                  ///< As in the question.
  std::optional<std::uint64_t> given_regions;                ///< As in the question.
  /// Whether the attempt may have to make room for others before its connection comes: only one of an id that isn't known here.
  std::optional<bool> crowded;

  static constexpr std::string_view side_message_type = "KvferryInitResponse";
  static constexpr auto side_message_fields() {
    return std::tuple(
        side_message_field("version", &InitAnswer::version), side_message_field("status", &InitAnswer::status),
        side_message_field("transport", &InitAnswer::transport),
        side_message_field("incarnation", &InitAnswer::incarnation),
        side_message_field("regions", &InitAnswer::regions), side_message_field("endpoint", &InitAnswer::endpoint),
        side_message_field("secret", &InitAnswer::secret), side_message_field("timeout_ms", &InitAnswer::timeout_ms),
        side_message_field("fenced_us", &InitAnswer::fenced_us),
        side_message_field("region_numbers", &InitAnswer::region_numbers),
        side_message_field("next_region", &InitAnswer::next_region),
        side_message_field("given_regions", &InitAnswer::given_regions),
        side_message_field("crowded", &InitAnswer::crowded));
  }
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_INIT_MESSAGES_HPP
