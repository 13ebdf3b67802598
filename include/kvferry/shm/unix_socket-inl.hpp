// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/unix_socket.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Connections that wait at a name. One more is refused with EAGAIN, so there are as many as the system allows.
inline constexpr int backlog = 65535;

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

KVFERRY_INLINE ssize_t UnixSocket::discard(std::size_t bytes) noexcept {
  std::array<std::byte, 16384> nowhere;
  std::size_t gone = 0;
  while (gone < bytes) {
    const ssize_t got = ::recv(descriptor(), nowhere.data(), std::min(bytes - gone, nowhere.size()), MSG_DONTWAIT);
    if (got <= 0) {
      return gone == 0 ? got : static_cast<ssize_t>(gone);
    }
    gone += static_cast<std::size_t>(got);
  }
  return static_cast<ssize_t>(gone);
}

KVFERRY_INLINE OpenMemory open_memory(std::int64_t pid, std::uint32_t user, std::uint64_t known_place) {
  OpenMemory memory{Descriptor(::open(("/proc/" + std::to_string(pid) + "/mem").c_str(), O_RDONLY | O_CLOEXEC)),
                    known_place};
  struct stat status {};
  if (memory && (::fstat(memory.file.get(), &status) != 0 || status.st_uid != user)) {
    memory.file.reset();
    errno = EPERM;  // another's process by now, or one that doesn't want to be looked at
  }
  return memory;
}

KVFERRY_INLINE UnixSocket::Peer UnixSocket::peer() const noexcept {
  pollfd looked_at{descriptor(), POLLRDHUP, 0};
  if (::poll(&looked_at, 1, 0) < 0) {
    return Peer::dead;
  }
  if (looked_at.revents != 0) {
    return Peer::hung_up;
  }
  std::byte there{};
  return !memory_ || ::pread(memory_.file.get(), &there, 1, static_cast<off_t>(memory_.known_place)) == 1 ? Peer::there
                                                                                                          : Peer::dead;
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
