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
#include <kvferry/tcp/peer_memory.hpp>

#include <kvferry/detail/descriptor_limit.hpp>
#include <kvferry/detail/standard_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Descriptors that come ahead of what is said of them, and go with one message.
inline constexpr std::size_t most_passed = tcp::PeerMemory::max_mapped;
/// Of bells that have come, so many are taken in one call.
inline constexpr std::size_t bells_at_once = 4096;
/// Room for them in a message.
using Control = std::array<std::byte, CMSG_SPACE(most_passed * sizeof(int))>;

/// A thread that checks the rings all the time checks the socket for its end once in so many checks: no bell tells of the end,
/// and that check takes as long as ten of the rings.
inline constexpr std::uint32_t looks_at_rings_alone = 256;
/// Of calls that take what came by the socket, before others have their turn. An honest peer's bells are few.
inline constexpr int most_calls_of_a_look = 256;

/// Connections that wait at a name. One more is refused with EAGAIN, so there are as many as the system allows.
inline constexpr int backlog = 65535;

/// @param call bind or connect.
template <class Call>
[[nodiscard]] Descriptor open_at(const std::vector<std::byte>& name, Call call) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), std::min(name.size(), sizeof(address.sun_path) - 1));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  occupy_standard_descriptors();
  Descriptor opened(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!opened || call(opened.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    throw TransferError({errno, std::system_category()}, "a Unix-domain socket");
  }
  return opened;
}

/// As recvmsg(2), which doesn't wait. There is room for all descriptors that a message may bring: those for which there
/// is none would be closed within the call, and whether closing a socket waits, and how long, is a setting of the peer's.
/// @param keep `bool(Descriptor&)`: takes it, or has it closed. Not called for those for which the process's table has no room.
/// @param no_room set if there were such.
template <class Keep>
ssize_t receive_with(int socket, std::span<iovec> pieces, Keep keep, bool& no_room) {
  constexpr std::size_t most_of_a_message = 253;  // SCM_MAX_FD
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(most_of_a_message * sizeof(int))> control;
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = pieces.size();
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0 && errno == ECONNRESET) {
    return 0;  // it was closed with bytes that nobody had read: here, that is an end like any other
  }
  if (got < 0) {
    return got;
  }
  no_room = no_room || (message.msg_flags & MSG_CTRUNC) != 0;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      Descriptor passed(number);
      if (!keep(passed)) {
        const linger none{};
        (void)::setsockopt(passed.get(), SOL_SOCKET, SO_LINGER, &none, sizeof(none));
      }
    }
  }
  return got;
}

}  // namespace internal

KVFERRY_INLINE ssize_t receive_bytes(int socket, std::span<iovec> pieces) {
  bool ignored = false;
  return receive_with(
      socket, pieces, [](Descriptor& /*passed*/) { return false; }, ignored);
}

KVFERRY_INLINE ssize_t send_with(int socket, std::span<iovec> pieces, std::span<const int> descriptors) {
  alignas(cmsghdr) Control control{};
  const std::size_t count = std::min(descriptors.size(), most_passed);
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = pieces.size();
  message.msg_control = control.data();
  message.msg_controllen = CMSG_SPACE(count * sizeof(int));
  cmsghdr* const part = CMSG_FIRSTHDR(&message);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(count * sizeof(int));
  std::memcpy(CMSG_DATA(part), descriptors.data(), count * sizeof(int));
  return ::sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

KVFERRY_INLINE void read_empty(int socket) noexcept {
  ::shutdown(socket, SHUT_RDWR);  // nothing more comes
  std::array<std::byte, 16384> nowhere;
  for (;;) {
    iovec next{nowhere.data(), nowhere.size()};
    const ssize_t got = receive_bytes(socket, {&next, 1});
    if (got == 0 || (got < 0 && errno != EINTR)) {
      return;
    }
  }
}

KVFERRY_INLINE void refuse_all(int listening) noexcept {
  ::shutdown(listening, SHUT_RDWR);
  for (;;) {
    const Descriptor waiting(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!waiting && errno != EINTR) {
      return;
    }
    read_empty(waiting.get());
  }
}

KVFERRY_INLINE ssize_t PassedDescriptors::receive(int socket, std::span<iovec> pieces, std::size_t most) {
  descriptors_.reserve(most_passed);  // once they have come there is to be room
  bool misused = false;
  const auto keep = [&](Descriptor& passed) {
    // A file without seals is no file in memory. To ask for more of it may take as long as whoever serves it likes.
    if (descriptors_.size() >= std::min(most, most_passed) || ::fcntl(passed.get(), F_GET_SEALS) < 0) {
      misused = true;
      return false;
    }
    auto held = Held<DescriptorsOfPeers>::take(1, share_of_descriptors(4, most_passed, 1 << 16));
    if (held) {
      descriptors_.push_back({std::move(passed), std::move(*held)});
    }
    lost_ = lost_ || !held;
    return held.has_value();
  };
  const ssize_t got = receive_with(socket, pieces, keep, lost_);
  if (misused) {
    errno = EPROTO;
    return -1;
  }
  return got;
}

KVFERRY_INLINE PassedDescriptor PassedDescriptors::take(std::uint64_t inode) {
  const auto it = std::ranges::find_if(descriptors_, [&](const PassedDescriptor& one) {
    struct stat status {};
    return ::fstat(one.file.get(), &status) == 0 && status.st_ino == inode;
  });
  if (it == descriptors_.end()) {
    return {};
  }
  PassedDescriptor found = std::move(*it);
  descriptors_.erase(it);
  return found;
}

KVFERRY_INLINE PassedDescriptor PassedDescriptors::take() {
  if (descriptors_.empty()) {
    return {};
  }
  PassedDescriptor found = std::move(descriptors_.front());
  descriptors_.erase(descriptors_.begin());
  return found;
}

/// With all descriptors that are to be passed, ahead of what is said of them.
KVFERRY_INLINE ssize_t UnixSocket::send_by_socket(std::span<iovec> pieces) {
  if (to_pass_.empty()) {
    return Socket::send(pieces);
  }
  std::array<int, most_passed> numbers{};
  const std::size_t count = std::min(to_pass_.size(), most_passed);
  for (std::size_t i = 0; i < count; ++i) {
    numbers[i] = to_pass_[i]->get();
  }
  const ssize_t sent = send_with(descriptor(), pieces, std::span(numbers).first(count));
  if (sent > 0) {
    to_pass_.clear();
  } else if (sent < 0 && errno == ETOOMANYREFS) {
    // This user has too many on their way. The peer doesn't map what it doesn't get.
    to_pass_.clear();
    return Socket::send(pieces);
  }
  return sent;
}

KVFERRY_INLINE ssize_t UnixSocket::send_into(ssize_t (ByteRings::*into_rings)(std::span<const iovec>) noexcept,
                                             std::span<iovec> pieces) {
  if (!rings_) {
    return send_by_socket(pieces);
  }
  if (by_socket_ != 0) {
    iovec first = pieces.front();
    first.iov_len = std::min(first.iov_len, by_socket_);
    const ssize_t sent = send_by_socket({&first, 1});
    by_socket_ -= sent > 0 ? static_cast<std::size_t>(sent) : 0;
    if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS)) {
      errno = ENOMEM;  // the first bytes always fit, and for room in the socket no bell rings
    }
    return sent;
  }
  if (!to_pass_.empty() || bell_owed_) {
    ring();
  }
  const ssize_t sent = ((*rings_).*into_rings)(pieces);
  if (sent > 0 && rings_->bell_due()) {
    ring();
  }
  return sent;
}

/// With what is to be passed. Where the socket takes nothing more the peer has bells to hear, and maps less; where it has ended,
/// whoever receives finds out.
KVFERRY_INLINE void UnixSocket::ring() noexcept {
  std::byte bell{};
  iovec piece{&bell, 1};
  bell_owed_ = false;
  if (send_by_socket({&piece, 1}) >= 0) {
    return;
  }
  to_pass_.clear();
  switch (errno) {
    case ENOBUFS:
    case ENOMEM:
    case EINTR: bell_owed_ = true; return;
    case EAGAIN:
    case EPIPE:
    case ECONNRESET: break;
    default:
      error_ = errno;  // the peer sleeps, and nobody can wake it
      rings_->end();
  }
  look_ = true;
}

KVFERRY_INLINE ssize_t UnixSocket::receive_with(ssize_t (ByteRings::*from_rings)(std::span<const iovec>) noexcept,
                                                std::span<iovec> pieces) {
  if (!rings_) {
    return passed_.receive(descriptor(), pieces);
  }
  ring_if_owed();
  for (bool looked = false;; looked = true) {
    const ssize_t got = ((*rings_).*from_rings)(pieces);
    if (got >= 0 || errno != EAGAIN) {
      looks_at_rings_ = 0;
      rings_->waits_no_more();
      if (got > 0 && rings_->bell_due()) {
        ring();
      }
      return got;
    }
    if (ended_) {
      return 0;
    }
    if (error_ != 0) {
      errno = error_;
      return -1;
    }
    if (looked || (!look_ && ++looks_at_rings_ < looks_at_rings_alone)) {
      rings_->waits_no_more();
      errno = EAGAIN;
      return -1;
    }
    (void)look();  // and then at the rings again: the peer had put there all that it had, before it hung up
  }
}

KVFERRY_INLINE bool UnixSocket::look() {
  look_ = false;
  looks_at_rings_ = 0;
  rings_->waits_no_more();  // the bell for it may be among these bytes
  std::array<std::byte, bells_at_once> bells;
  iovec piece{bells.data(), bells.size()};
  const ssize_t got = passed_.receive(descriptor(), {&piece, 1});
  if (got == 0 && !ended_) {
    ended_ = true;
    rings_->end();
  } else if (got < 0 && errno != EAGAIN && errno != EINTR) {
    error_ = errno;
    rings_->end();
  }
  return got > 0;
}

KVFERRY_INLINE bool UnixSocket::may_wait(bool for_room) noexcept {
  ring_if_owed();
  // A side that has a bell to ring tries that again, in turn with others' work.
  return !rings_ || (!ended_ && error_ == 0 && !bell_owed_ && rings_->may_wait(for_room));
}

KVFERRY_INLINE PassedDescriptor UnixSocket::take_passed(std::uint64_t inode) {
  PassedDescriptor found = passed_.take(inode);
  // It was passed before anything was said of it, which came through the rings.
  for (int calls = 0; rings_ && !found.file && calls < most_calls_of_a_look && look(); ++calls) {
    found = passed_.take(inode);
  }
  return found;
}

KVFERRY_INLINE ssize_t UnixSocket::discard(std::size_t bytes) {
  std::array<std::byte, 16384> nowhere;
  std::size_t gone = 0;
  while (gone < bytes) {
    iovec next{nowhere.data(), std::min(bytes - gone, nowhere.size())};
    const ssize_t got = receive({&next, 1});
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

KVFERRY_INLINE bool UnixSocket::hung_up() const noexcept {
  for (;;) {
    pollfd looked_at{descriptor(), POLLRDHUP, 0};
    // A signal interrupts it though it doesn't wait.
    if (const int found = ::poll(&looked_at, 1, 0); found >= 0 || errno != EINTR) {
      look_ = look_ || found != 0;
      return found != 0;
    }
  }
}

/// Unknown: yes.
KVFERRY_INLINE bool UnixSocket::lives() const noexcept {
  std::byte there{};
  return !memory_ || ::pread(memory_.file.get(), &there, 1, static_cast<off_t>(memory_.known_place)) == 1;
}

/// A peer that tells by its rings says there that it hangs up, before it does. Mapped memory is kept by the mapping: when the peer
/// has died, nobody changes it but its children. (docs/architecture.md, "Validity of the bytes")
KVFERRY_INLINE UnixSocket::Peer UnixSocket::peer(Copied copied) const noexcept {
  const std::uint64_t told = rings_ ? rings_->peers_state() : 0;
  if ((told & RingState::over) != 0) {
    look_ = true;
    return Peer::hung_up;
  }
  if ((told & RingState::tells) != 0) {
    const bool stays = copied != Copied::in_place && (told & RingState::forked) == 0;
    if (stays ? copied == Copied::mapped || !hung_up() : memory_ && lives()) {
      return Peer::there;
    }
  }
  if (hung_up()) {
    return Peer::hung_up;
  }
  return lives() ? Peer::there : Peer::dead;
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
