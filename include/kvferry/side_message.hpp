// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_SIDE_MESSAGE_HPP
#define KVFERRY_SIDE_MESSAGE_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

using Bytes = std::vector<std::byte>;

/// One field of a side message: its name on the wire, and the struct's member for it.
template <class Message, class Value>
struct SideMessageField {
  std::string_view name;
  Value Message::*member;
};

/// Names a member for `side_message_fields`.
template <class Message, class Value>
[[nodiscard]] constexpr SideMessageField<Message, Value> side_message_field(std::string_view name,
                                                                            Value Message::*member) noexcept {
  return {name, member};
}

/// A struct that can travel as a side message. It declares its name on the wire, and its fields in the order in which
/// they are written:
/// @code
/// struct CacheQuery {
///   std::string model;
///   std::uint64_t tokens = 0;
///
///   static constexpr std::string_view side_message_type = "CacheQuery";
///   static constexpr auto side_message_fields() {
///     return std::tuple(kvferry::side_message_field("model", &CacheQuery::model),
///                       kvferry::side_message_field("tokens", &CacheQuery::tokens));
///   }
/// };
/// @endcode
/// A field may have any type that msgpack-cxx converts: integers, floats, bool, `std::string` (str), `kvferry::Bytes`
/// (bin), `std::vector`, `std::map`, `std::optional`. If a field is missing on arrival, that is an error, unless it is
/// a `std::optional`.
template <class T>
concept SideMessageStruct = requires {
  { T::side_message_type } -> std::convertible_to<std::string_view>;
  T::side_message_fields();
};

/// A message of the handshake, encoded: the bytes of a msgspec tagged struct in msgpack, a map whose key "type" holds the
/// struct's name. `encode_side_message` and `decode_side_message` (side_message_codec.hpp) convert it from and to structs.
class KVFERRY_EXPORT SideMessage {
 public:
  SideMessage() = default;

  /// @param type the value of the key "type" in `encoded`.
  /// @param encoded the whole msgpack map.
  SideMessage(std::string type, Bytes encoded) : type_(std::move(type)), encoded_(std::move(encoded)) {}

  [[nodiscard]] const std::string& type() const noexcept { return type_; }
  [[nodiscard]] const Bytes& encoded() const noexcept { return encoded_; }

  /// Whether this is a message of struct T.
  template <SideMessageStruct T>
  [[nodiscard]] bool is() const noexcept {
    return type_ == T::side_message_type;
  }

  friend bool operator==(const SideMessage&, const SideMessage&) = default;

 private:
  std::string type_;
  Bytes encoded_;
};

/// LMCache's question for a peer's lookup url. The answer is a `P2PInitSideRetMsg`.
struct P2PInitSideMsg {
  static constexpr std::string_view side_message_type = "P2PInitSideMsg";
  static constexpr auto side_message_fields() { return std::tuple<>(); }
};

/// LMCache's answer to `P2PInitSideMsg`.
struct P2PInitSideRetMsg {
  std::string peer_lookup_url;

  static constexpr std::string_view side_message_type = "P2PInitSideRetMsg";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("peer_lookup_url", &P2PInitSideRetMsg::peer_lookup_url));
  }
};

/// The handshake of LMCache's `py_socket` channel. The answer is a `PySocketInitResponse`.
struct PySocketInitRequest {
  std::string peer_init_url;

  static constexpr std::string_view side_message_type = "PySocketInitRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("peer_init_url", &PySocketInitRequest::peer_init_url));
  }
};

/// The answer to `PySocketInitRequest`; `status` is "ok".
struct PySocketInitResponse {
  std::string status;

  static constexpr std::string_view side_message_type = "PySocketInitResponse";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("status", &PySocketInitResponse::status));
  }
};

/// kvferry's answer to a request that it cannot serve: of unknown type, malformed, or refused. `send_init_side_msg` and
/// `lazy_init_peer_connection` turn it into an error code.
struct SideMessageError {
  std::int64_t code = 0;  ///< A `kvferry::errc`.
  std::string message;    ///< A sentence for people.

  static constexpr std::string_view side_message_type = "KvferryError";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("code", &SideMessageError::code),
                      side_message_field("message", &SideMessageError::message));
  }
};

}  // namespace kvferry

#endif  // KVFERRY_SIDE_MESSAGE_HPP
