// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>
#include <unistd.h>

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
  /// Ends the connection and wakes whoever waits for its events.
  void shut() const noexcept { ::shutdown(descriptor_, SHUT_RDWR); }

 private:
  const int descriptor_;
};

}  // namespace kvferry::tcp
