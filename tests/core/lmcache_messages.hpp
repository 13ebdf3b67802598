// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cstddef>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// LMCache's messages as msgspec encodes them.
inline constexpr std::string_view p2p_init_hex = "81a474797065ae503250496e6974536964654d7367";
inline constexpr std::string_view p2p_init_ret_hex =
    "82a474797065b1503250496e6974536964655265744d7367af706565725f6c6f6f6b75705f75726cb3"
    "7463703a2f2f31302e302e302e373a35363030";
inline constexpr std::string_view py_socket_request_hex =
    "82a474797065b35079536f636b6574496e697452657175657374ad706565725f696e69745f75726cad"
    "31302e302e302e373a35353535";
inline constexpr std::string_view py_socket_response_hex =
    "82a474797065b45079536f636b6574496e6974526573706f6e7365a6737461747573a26f6b";

inline constexpr std::string_view peer_lookup_url = "tcp://10.0.0.7:5600";
inline constexpr std::string_view peer_init_url = "10.0.0.7:5555";

inline Bytes from_hex(std::string_view hex) {
  Bytes bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    unsigned value = 0;
    const auto* end = hex.data() + i + 2;
    if (std::from_chars(hex.data() + i, end, value, 16).ptr != end) {
      throw std::invalid_argument("not hex: " + std::string(hex));
    }
    bytes.push_back(static_cast<std::byte>(value));
  }
  return bytes;
}

inline std::string to_hex(std::span<const std::byte> bytes) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string hex;
  for (const auto byte : bytes) {
    hex += digits[std::to_integer<unsigned>(byte) >> 4U];
    hex += digits[std::to_integer<unsigned>(byte) & 15U];
  }
  return hex;
}

}  // namespace kvferry::test
