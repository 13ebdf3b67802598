// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/unix_socket.hpp>

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Connections that wait at a name. One more is refused with EAGAIN, so there are many.
inline constexpr int backlog = 128;

/// @param call bind or connect.
template <class Call>
[[nodiscard]] Descriptor open_at(const std::vector<std::byte>& name, Call call) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), std::min(name.size(), sizeof(address.sun_path) - 1));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  Descriptor opened(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!opened || call(opened.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    throw TransferError({errno, std::system_category()}, "a Unix-domain socket");
  }
  return opened;
}

}  // namespace internal

KVFERRY_INLINE ssize_t UnixSocket::discard(std::size_t bytes) const noexcept {
  std::array<std::byte, 16384> nowhere;
  return ::recv(descriptor(), nowhere.data(), std::min(bytes, nowhere.size()), MSG_DONTWAIT);
}

KVFERRY_INLINE UnixSocket::Peer UnixSocket::peer() const noexcept {
  std::array<pollfd, 2> looked_at{{{descriptor(), POLLRDHUP, 0}, {process_.get(), POLLIN, 0}}};
  if (::poll(looked_at.data(), looked_at.size(), 0) < 0) {
    return Peer::dead;
  }
  if (looked_at[0].revents != 0) {
    return Peer::hung_up;
  }
  return looked_at[1].revents != 0 ? Peer::dead : Peer::there;
}

KVFERRY_INLINE PeerProcess peer_process(int descriptor) {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    throw TransferError({errno, std::system_category()}, "the process at a Unix-domain socket");
  }
  return {credentials.pid, credentials.uid};
}

KVFERRY_INLINE Descriptor listen_at(const std::vector<std::byte>& name) {
  Descriptor listening = open_at(name, ::bind);
  if (::listen(listening.get(), backlog) != 0) {
    throw TransferError({errno, std::system_category()}, "listening at a Unix-domain socket");
  }
  return listening;
}

KVFERRY_INLINE Descriptor connect_to(const std::vector<std::byte>& name) { return open_at(name, ::connect); }

}  // namespace kvferry::shm
