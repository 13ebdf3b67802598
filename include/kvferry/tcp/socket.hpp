// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// A connected socket: of TCP, unless a subclass says else. Shared by its lane and whoever waits for its events, so that no number is used after it was
/// closed.
class KVFERRY_EXPORT Socket {
 public:
  explicit Socket(int descriptor) noexcept : descriptor_(descriptor) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  virtual ~Socket() { ::close(descriptor_); }

  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }
  /// Has the end reset the connection, rather than send first what is left to send: the system would go on for minutes.
  void drop_unsent() const noexcept {
    const linger reset{1, 0};
    ::setsockopt(descriptor_, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  }
  /// Ends the connection and wakes whoever waits for its events.
  void shut() const noexcept { ::shutdown(descriptor_, SHUT_RDWR); }

  /// Throws received bytes away. @return as recv(2) does, which doesn't wait.
  [[nodiscard]] virtual ssize_t discard(std::size_t bytes) const noexcept {
    // On a TCP socket MSG_TRUNC drops the bytes in the kernel (tcp(7)). The sanitizers' wrapper of recv(2) doesn't know
    // that and takes them to be stored at address null, hence the bare system call.
    return ::syscall(SYS_recvfrom, descriptor_, nullptr, bytes, MSG_DONTWAIT | MSG_TRUNC, nullptr, nullptr);
  }
  /// The connection is given up: called before its operations end.
  virtual void operations_end() const noexcept {}
  /// That it holds.
  [[nodiscard]] virtual std::size_t descriptors() const noexcept { return 1; }

 private:
  const int descriptor_;
};

}  // namespace kvferry::tcp
