// SPDX-License-Identifier: Apache-2.0
// The clock, waiting for descriptors, chance and connections, as threads that a Scheduler runs see them; see
// system_threads.cpp. Connections between these threads are Unix sockets under a TCP socket's name: what one side sends, the
// other can receive at once, whatever the machine is doing.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "scheduler.hpp"
#include "sides.hpp"

namespace {

using kvferry::schedules::Nanoseconds;
using kvferry::schedules::Scheduler;

std::optional<Nanoseconds> until(const Scheduler& scheduler, int milliseconds) {
  return milliseconds < 0 ? std::nullopt : std::optional(scheduler.now() + std::chrono::milliseconds(milliseconds));
}

/// The names of both ends of a socket.
struct Ends {
  sockaddr_in local{};
  sockaddr_in remote{};
  bool has_sent = false;  ///< The first bytes of a connection always fit its send buffer.
};

/// Of the sockets of these threads; one has its turn at a time.
std::map<int, Ends>& sockets() {
  static std::map<int, Ends> all;
  return all;
}

Ends* find(int descriptor) {
  if (Scheduler::current() == nullptr) {
    return nullptr;
  }
  const auto it = sockets().find(descriptor);
  return it == sockets().end() ? nullptr : &it->second;
}

sockaddr_in loopback(std::uint16_t port) {
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_port = htons(port);
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return name;
}

std::uint16_t last_tcp_port = 0;

std::uint16_t next_port() { return ++last_tcp_port; }

/// Makes the name that stands for a port. No other process has it.
socklen_t name_of(const sockaddr_in& tcp, sockaddr_un& name) {
  const std::string text = "kvferry-schedule-" + std::to_string(::getpid()) + "-" + std::to_string(ntohs(tcp.sin_port));
  name.sun_family = AF_UNIX;
  std::ranges::copy(text, &name.sun_path[1]);  // behind a zero: the name of no file
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

int tell(const sockaddr_in& name, sockaddr* address, socklen_t* size) {
  std::memcpy(address, &name, std::min<std::size_t>(*size, sizeof(name)));
  *size = sizeof(name);
  return 0;
}

/// The first `size` bytes of the pieces.
std::vector<iovec> cut(const msghdr& message, std::size_t size) {
  std::vector<iovec> pieces;
  for (const iovec& piece : std::span(message.msg_iov, message.msg_iovlen)) {
    if (size == 0) {
      break;
    }
    pieces.push_back({piece.iov_base, std::min(piece.iov_len, size)});
    size -= pieces.back().iov_len;
  }
  return pieces;
}

/// How many bytes a transfer may move this time: none, some, or all that it can.
std::optional<std::size_t> short_of(Scheduler& scheduler) {
  return scheduler.cut_short() ? std::optional<std::size_t>(scheduler.dice(3) == 0 ? 0 : 1 + scheduler.dice(3000))
                               : std::nullopt;
}

}  // namespace

// Clang lets no function of C return a class.
std::chrono::steady_clock::time_point real_steady_clock_now() __asm__("__real__ZNSt6chrono3_V212steady_clock3nowEv");
std::chrono::steady_clock::time_point wrapped_steady_clock_now() __asm__("__wrap__ZNSt6chrono3_V212steady_clock3nowEv");

std::chrono::steady_clock::time_point wrapped_steady_clock_now() {
  Scheduler* const scheduler = Scheduler::current();
  return scheduler == nullptr ? real_steady_clock_now()
                              : std::chrono::steady_clock::time_point(scheduler->read_clock());
}

extern "C" {

std::random_device::result_type __real__ZNSt13random_device9_M_getvalEv(std::random_device* device);
int __real_timerfd_create(int clock, int flags);
int __real_poll(pollfd* descriptors, nfds_t count, int timeout);
int __real_epoll_wait(int epoll, epoll_event* events, int count, int timeout);
int __real_epoll_ctl(int epoll, int operation, int descriptor, epoll_event* event);
ssize_t __real_getrandom(void* to, std::size_t size, unsigned flags);
int __real_socket(int domain, int type, int protocol);
int __real_bind(int descriptor, const sockaddr* address, socklen_t size);
int __real_connect(int descriptor, const sockaddr* address, socklen_t size);
int __real_accept4(int descriptor, sockaddr* address, socklen_t* size, int flags);
int __real_getsockname(int descriptor, sockaddr* address, socklen_t* size);
int __real_getpeername(int descriptor, sockaddr* address, socklen_t* size);
int __real_setsockopt(int descriptor, int level, int name, const void* value, socklen_t size);
int __real_getsockopt(int descriptor, int level, int name, void* value, socklen_t* size);
ssize_t __real_send(int descriptor, const void* data, std::size_t size, int flags);
ssize_t __real_recv(int descriptor, void* data, std::size_t size, int flags);
ssize_t __real_sendmsg(int descriptor, const msghdr* message, int flags);
ssize_t __real_recvmsg(int descriptor, msghdr* message, int flags);
int __real_shutdown(int descriptor, int how);
int __real_close(int descriptor);
long __real_syscall(long number, ...);

std::random_device::result_type __wrap__ZNSt13random_device9_M_getvalEv(std::random_device* device) {
  Scheduler* const scheduler = Scheduler::current();
  return scheduler == nullptr ? __real__ZNSt13random_device9_M_getvalEv(device)
                              : static_cast<std::random_device::result_type>(scheduler->dice(1ULL << 32));
}

ssize_t __wrap_getrandom(void* to, std::size_t size, unsigned flags) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_getrandom(to, size, flags);
  }
  for (std::size_t i = 0; i < size; ++i) {
    static_cast<unsigned char*>(to)[i] = static_cast<unsigned char>(scheduler->dice(256));
  }
  return static_cast<ssize_t>(size);
}

// Asio then has no descriptor for its timers, but looks at the clock, and says how long it will wait.
int __wrap_timerfd_create(int clock, int flags) {
  if (Scheduler::current() == nullptr) {
    return __real_timerfd_create(clock, flags);
  }
  errno = ENOSYS;
  return -1;
}

int __wrap_poll(pollfd* descriptors, nfds_t count, int timeout) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_poll(descriptors, count, timeout);
  }
  scheduler->point("polls");
  for (const auto end = until(*scheduler, timeout);;) {
    const int found = __real_poll(descriptors, count, 0);
    if (found != 0 || timeout == 0 || !scheduler->look_later("waits in poll", end)) {
      return found;
    }
  }
}

int __wrap_epoll_wait(int epoll, epoll_event* events, int count, int timeout) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_epoll_wait(epoll, events, count, timeout);
  }
  scheduler->point("looks at its sockets");
  for (const auto end = until(*scheduler, timeout);;) {
    const int found = __real_epoll_wait(epoll, events, count, 0);
    if (found == 0 && timeout != 0 && scheduler->look_later("waits in epoll_wait", end)) {
      continue;
    }
    // A Unix socket whose peer has closed hangs up; a TCP socket just has an end to be read.
    for (epoll_event& event : std::span(events, static_cast<std::size_t>(std::max(found, 0)))) {
      if ((event.events & EPOLLHUP) != 0 && (event.events & EPOLLERR) == 0) {
        event.events = (event.events & ~std::uint32_t{EPOLLHUP}) | EPOLLIN;
      }
    }
    return found;
  }
}

int __wrap_epoll_ctl(int epoll, int operation, int descriptor, epoll_event* event) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    scheduler->point("says what it waits for");
  }
  return __real_epoll_ctl(epoll, operation, descriptor, event);
}

int __wrap_socket(int domain, int type, int protocol) {
  if (Scheduler::current() == nullptr || (domain != AF_INET && domain != AF_INET6)) {
    return __real_socket(domain, type, protocol);
  }
  const int made = __real_socket(AF_UNIX, type, 0);
  if (made >= 0) {
    sockets()[made] = {loopback(0), loopback(0)};
  }
  return made;
}

int __wrap_bind(int descriptor, const sockaddr* address, socklen_t size) {
  Ends* const ends = find(descriptor);
  if (ends == nullptr) {
    return __real_bind(descriptor, address, size);
  }
  sockaddr_in asked{};
  std::memcpy(&asked, address, std::min<std::size_t>(size, sizeof(asked)));
  ends->local = loopback(asked.sin_port == 0 ? next_port() : ntohs(asked.sin_port));
  sockaddr_un name{};
  const socklen_t length = name_of(ends->local, name);
  return __real_bind(descriptor, reinterpret_cast<const sockaddr*>(&name), length);
}

int __wrap_connect(int descriptor, const sockaddr* address, socklen_t size) {
  Ends* const ends = find(descriptor);
  if (ends == nullptr) {
    return __real_connect(descriptor, address, size);
  }
  Scheduler::current()->point("connects");
  std::memcpy(&ends->remote, address, std::min<std::size_t>(size, sizeof(ends->remote)));
  ends->local = loopback(next_port());
  sockaddr_un name{};
  const socklen_t length = name_of(ends->remote, name);
  return __real_connect(descriptor, reinterpret_cast<const sockaddr*>(&name), length);
}

int __wrap_accept4(int descriptor, sockaddr* address, socklen_t* size, int flags) {
  const Ends* const listening = find(descriptor);
  if (listening == nullptr) {
    return __real_accept4(descriptor, address, size, flags);
  }
  Scheduler::current()->point("accepts");
  const int made = __real_accept4(descriptor, nullptr, nullptr, flags);
  if (made >= 0) {
    const Ends ends{listening->local, loopback(next_port())};
    sockets()[made] = ends;
    (void)tell(ends.remote, address, size);
  }
  return made;
}

int __wrap_getsockname(int descriptor, sockaddr* address, socklen_t* size) {
  const Ends* const ends = find(descriptor);
  return ends == nullptr ? __real_getsockname(descriptor, address, size) : tell(ends->local, address, size);
}

int __wrap_getpeername(int descriptor, sockaddr* address, socklen_t* size) {
  const Ends* const ends = find(descriptor);
  return ends == nullptr ? __real_getpeername(descriptor, address, size) : tell(ends->remote, address, size);
}

int __wrap_setsockopt(int descriptor, int level, int name, const void* value, socklen_t size) {
  return level != SOL_SOCKET && find(descriptor) != nullptr ? 0
                                                            : __real_setsockopt(descriptor, level, name, value, size);
}

int __wrap_getsockopt(int descriptor, int level, int name, void* value, socklen_t* size) {
  if (level != SOL_SOCKET && find(descriptor) != nullptr) {
    std::memset(value, 0, *size);
    return 0;
  }
  return __real_getsockopt(descriptor, level, name, value, size);
}

ssize_t __wrap_sendmsg(int descriptor, const msghdr* message, int flags) {
  Ends* const ends = find(descriptor);
  if (ends == nullptr) {
    return __real_sendmsg(descriptor, message, flags);
  }
  const bool first = !std::exchange(ends->has_sent, true);
  Scheduler::current()->point("sends");
  const auto limit = first ? std::nullopt : short_of(*Scheduler::current());
  if (!limit) {
    return __real_sendmsg(descriptor, message, flags);
  }
  auto pieces = cut(*message, *limit);
  if (pieces.empty()) {
    errno = EAGAIN;
    return -1;
  }
  msghdr shorter = *message;
  shorter.msg_iov = pieces.data();
  shorter.msg_iovlen = pieces.size();
  return __real_sendmsg(descriptor, &shorter, flags);
}

ssize_t __wrap_recvmsg(int descriptor, msghdr* message, int flags) {
  if (find(descriptor) == nullptr) {
    return __real_recvmsg(descriptor, message, flags);
  }
  Scheduler::current()->point("receives");
  const auto limit = short_of(*Scheduler::current());
  if (!limit) {
    return __real_recvmsg(descriptor, message, flags);
  }
  auto pieces = cut(*message, *limit);
  if (pieces.empty()) {
    errno = EAGAIN;
    return -1;
  }
  msghdr shorter = *message;
  shorter.msg_iov = pieces.data();
  shorter.msg_iovlen = pieces.size();
  return __real_recvmsg(descriptor, &shorter, flags);
}

ssize_t __wrap_send(int descriptor, const void* data, std::size_t size, int flags) {
  if (find(descriptor) == nullptr) {
    return __real_send(descriptor, data, size, flags);
  }
  iovec piece{const_cast<void*>(data), size};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  return __wrap_sendmsg(descriptor, &message, flags);
}

ssize_t __wrap_recv(int descriptor, void* data, std::size_t size, int flags) {
  if (find(descriptor) == nullptr) {
    return __real_recv(descriptor, data, size, flags);
  }
  iovec piece{data, size};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  return __wrap_recvmsg(descriptor, &message, flags);
}

// A TCP socket drops what is received to nowhere with MSG_TRUNC.
long __wrap_syscall(long number, ...) {
  std::array<long, 6> arguments{};
  va_list list;
  va_start(list, number);
  for (long& argument : arguments) {
    argument = va_arg(list, long);
  }
  va_end(list);
  const auto descriptor = static_cast<int>(arguments[0]);
  if (number == SYS_recvfrom && arguments[1] == 0 && find(descriptor) != nullptr) {
    std::vector<std::byte> nowhere(
        std::min<std::size_t>(static_cast<std::size_t>(arguments[2]), std::size_t{64} << 10));
    return __wrap_recv(descriptor, nowhere.data(), nowhere.size(), MSG_DONTWAIT);
  }
  return __real_syscall(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

int __wrap_shutdown(int descriptor, int how) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    scheduler->point("shuts a socket down");
  }
  return __real_shutdown(descriptor, how);
}

int __wrap_close(int descriptor) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    sockets().erase(descriptor);
    scheduler->point("closes a descriptor");
  }
  return __real_close(descriptor);
}

}  // extern "C"

namespace kvferry::inline KVFERRY_ABI::schedules {

void cut_connections() {
  std::vector<int> connected;
  for (const auto& [descriptor, ends] : sockets()) {
    if (ends.remote.sin_port != 0) {
      connected.push_back(descriptor);
    }
  }
  for (const int descriptor : connected) {
    if (sockets().count(descriptor) != 0) {
      (void)__wrap_shutdown(descriptor, SHUT_RDWR);
    }
  }
}

void reset_connections() {
  EXPECT_TRUE(sockets().empty()) << "left open by the round before";
  sockets().clear();
  last_tcp_port = 0;
}

std::size_t open_sockets() { return sockets().size(); }

}  // namespace kvferry::schedules
