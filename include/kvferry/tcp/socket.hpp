// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// A connected socket. Shared by its lane and whoever waits for its events, so that no number is used after it was
/// closed.
class Socket {
 public:
  explicit Socket(int descriptor) noexcept : descriptor_(descriptor) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() { ::close(descriptor_); }

  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }
  /// Has the end reset the connection, rather than send first what is left to send: the system would go on for minutes.
  void drop_unsent() const noexcept {
    const linger reset{1, 0};
    ::setsockopt(descriptor_, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  }
  /// TCP_CONGESTION; empty if it has none.
  [[nodiscard]] std::string congestion_control() const {
    std::array<char, 16> name{};  // TCP_CA_NAME_MAX
    socklen_t size = name.size();
    if (::getsockopt(descriptor_, IPPROTO_TCP, TCP_CONGESTION, name.data(), &size) != 0) {
      return {};
    }
    return {name.data(), ::strnlen(name.data(), size)};
  }
  /// Ends the connection and wakes whoever waits for its events.
  void shut() const noexcept { ::shutdown(descriptor_, SHUT_RDWR); }

 private:
  const int descriptor_;
};

}  // namespace kvferry::tcp
