// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include <kvferry/config.hpp>

// The bytes of a DEALER on a connection of ZeroMQ's, for tests that send what ZeroMQ itself wouldn't. Source: ZMTP 3.0,
// https://rfc.zeromq.org/spec/23/
namespace kvferry::inline KVFERRY_ABI::test {

constexpr std::size_t zmtp_greeting_bytes = 64;

/// The greeting and a READY.
inline std::string zmtp_hello() {
  std::string hello("\xFF\0\0\0\0\0\0\0\1\x7F\3\0NULL", 16);
  hello.resize(zmtp_greeting_bytes);
  return hello + std::string("\4\x1C\5READY\xBSocket-Type\0\0\0\6DEALER", 30);
}

/// Says them, and waits for the other side's: libzmq hangs up on who says more before. @return whether
/// the other side has said them.
inline bool zmtp_greet(int socket) {
  const std::string hello = zmtp_hello();
  std::array<unsigned char, zmtp_greeting_bytes + 2 + 255> theirs{};  // with a READY in a short frame
  const auto receive = [&](std::size_t begin, std::size_t count) {
    return ::recv(socket, theirs.data() + begin, count, MSG_WAITALL) == static_cast<ssize_t>(count);
  };
  constexpr std::size_t header_end = zmtp_greeting_bytes + 2;
  return ::send(socket, hello.data(), hello.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(hello.size()) &&
         receive(0, header_end) && receive(header_end, theirs[header_end - 1]);
}

/// An empty frame, and one with the payload.
inline std::string zmtp_request(std::span<const std::byte> payload) {
  std::string request("\1\0\2", 3);
  for (int shift = 56; shift >= 0; shift -= 8) {
    request += static_cast<char>(std::uint64_t{payload.size()} >> shift & 0xFF);
  }
  request.append(reinterpret_cast<const char*>(payload.data()), payload.size());
  return request;
}

}  // namespace kvferry::test
