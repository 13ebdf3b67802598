// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The errno of a socket whose peer breaks the rules outside of the stream of bytes.
inline constexpr int senseless_peer = EUCLEAN;

/// A connected socket: TCP's, unless a subclass differs. Its lane shares it with the threads that wait for its events,
/// so the descriptor's number isn't used after it was closed.
class KVFERRY_EXPORT Socket {
 public:
  explicit Socket(int descriptor) noexcept : descriptor_(descriptor) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  virtual ~Socket() { ::close(descriptor_); }

  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }
  /// Makes the end reset the connection instead of first sending the remaining bytes, which the system would try for
  /// minutes.
  void drop_unsent() const noexcept {
    const linger reset{1, 0};
    ::setsockopt(descriptor_, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  }
  /// Ends the connection and wakes the threads that wait for its events.
  void shut() const noexcept { ::shutdown(descriptor_, SHUT_RDWR); }

  // A single piece goes without a list of pieces, which the kernel would have to fetch and check: polling asks for one
  // piece, the next header, most of the time.

  /// @return as sendmsg(2) does, which doesn't wait and raises no signal.
  [[nodiscard]] virtual ssize_t send(std::span<iovec> pieces) {
    constexpr int flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    if (pieces.size() == 1) {
      return ::send(descriptor_, pieces.front().iov_base, pieces.front().iov_len, flags);
    }
    const msghdr header = message(pieces);
    return ::sendmsg(descriptor_, &header, flags);
  }
  /// @return as recvmsg(2) does, which doesn't wait.
  [[nodiscard]] virtual ssize_t receive(std::span<iovec> pieces) {
    if (pieces.size() == 1) {
      return ::recv(descriptor_, pieces.front().iov_base, pieces.front().iov_len, MSG_DONTWAIT);
    }
    msghdr header = message(pieces);
    return ::recvmsg(descriptor_, &header, MSG_DONTWAIT);
  }

  /// The same, to memory that may be missing. EFAULT: the first byte's memory is missing.
  [[nodiscard]] virtual ssize_t receive_payload(std::span<iovec> pieces) { return receive(pieces); }

  /// @name For sockets whose bytes pass through the CPU on their way
  /// The CPU reads the sent bytes and writes the received ones, so their memory has to exist, except for `send_payload`
  /// and `receive_payload`. Bytes of both directions may be held back.
  /// @{

  [[nodiscard]] virtual bool by_cpu() const noexcept { return false; }
  /// How many of `wanted` bytes there is room for now, if that is known; else any number.
  [[nodiscard]] virtual std::size_t room(std::size_t wanted) noexcept { return wanted; }
  /// Whether there is a `send_payload`, by which the kernel copies.
  [[nodiscard]] virtual bool kernel_copies() const noexcept { return false; }
  /// As `send`, for memory that may be missing. EFAULT: the first byte's memory is missing.
  [[nodiscard]] virtual ssize_t send_payload(std::span<iovec> pieces) { return send(pieces); }
  /// Whether `receive` must not get memory that may be missing.
  [[nodiscard]] virtual bool to_buffer() const noexcept { return by_cpu(); }
  /// Whether bytes that `send` has accepted are still held back. They then have to be flushed first.
  [[nodiscard]] virtual bool holds_back() const noexcept { return false; }
  /// @return 0 if all of them have gone, else as `send`.
  [[nodiscard]] virtual ssize_t flush() { return 0; }
  /// Whether `receive` has more bytes, or an end, that no event announces.
  [[nodiscard]] virtual bool over() const noexcept { return false; }
  /// How many records the received bytes came in, if each takes work of its own.
  [[nodiscard]] virtual std::uint64_t records() const noexcept { return 0; }
  /// An orderly end.
  virtual void say_end() {}
  /// @}

  /// @name For sockets whose bytes come past the descriptor
  /// The descriptor's events then announce them only if the peer rings a bell. It does so only if this side has
  /// announced that it waits.
  /// @{

  [[nodiscard]] virtual bool hears_bells() const noexcept { return false; }
  /// Announces that a thread is about to wait for the descriptor to be readable, which means that there are bytes, or,
  /// if asked for, room. The next `receive` may withdraw the announcement.
  /// @return false if there are bytes or room already; then don't wait.
  [[nodiscard]] virtual bool may_wait(bool for_room) noexcept {
    (void)for_room;
    return true;
  }
  /// The descriptor was readable.
  virtual void woken() noexcept {}
  /// @}

  /// Whether descriptors come with the bytes. EPROTO then says that the peer has passed what it may not.
  [[nodiscard]] virtual bool brings_descriptors() const noexcept { return false; }

  /// Throws received bytes away. @return as recv(2) does, which doesn't wait.
  [[nodiscard]] virtual ssize_t discard(std::size_t bytes) {
    // On a TCP socket MSG_TRUNC drops the bytes in the kernel (tcp(7)). The sanitizers' wrapper of recv(2) doesn't know
    // that and takes them to be stored at address null, hence the bare system call.
    return ::syscall(SYS_recvfrom, descriptor_, nullptr, bytes, MSG_DONTWAIT | MSG_TRUNC, nullptr, nullptr);
  }
  /// The connection is given up: called before its operations end.
  virtual void operations_end() const noexcept {}
  /// That it holds.
  [[nodiscard]] virtual std::size_t descriptors() const noexcept { return 1; }

 private:
  [[nodiscard]] static msghdr message(std::span<iovec> pieces) noexcept {
    msghdr header{};
    header.msg_iov = pieces.data();
    header.msg_iovlen = pieces.size();
    return header;
  }

  const int descriptor_;
};

}  // namespace kvferry::tcp
