// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/hello.hpp>

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>

#include <kvferry/error.hpp>

#include <kvferry/tcp/socket.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE Secret random_secret() {
  Secret secret;
  make_secret(secret);
  return secret;
}

inline namespace internal {

KVFERRY_INLINE int set_congestion_control(int socket, const std::string& name) {
  return ::setsockopt(socket, IPPROTO_TCP, TCP_CONGESTION, name.data(), static_cast<socklen_t>(name.size()));
}

/// The options of sockets are ints, and one that is cut off isn't what was asked for.
KVFERRY_INLINE int int_at_most(std::uint64_t value, int most) noexcept {
  return static_cast<int>(std::min(value, static_cast<std::uint64_t>(most)));
}

/// Whether both ends have one address: two programs of one host, or of one network namespace.
KVFERRY_INLINE bool stays_on_host(const asio::ip::tcp::socket& socket) {
  std::error_code ec;
  const auto local = socket.local_endpoint(ec);
  if (ec) {
    return false;
  }
  const auto remote = socket.remote_endpoint(ec);
  return !ec && (local.address() == remote.address() ||
                 (local.address().is_loopback() && remote.address().is_loopback()));
}

}  // namespace internal

KVFERRY_INLINE void check_congestion_control(const std::string& name) {
  if (name.empty()) {
    return;
  }
  const Socket probe(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (probe.descriptor() == -1 || set_congestion_control(probe.descriptor(), name) != 0) {
    const std::error_code ec(errno, std::system_category());
    throw TransferError(ec, "congestion control '" + name + "'");
  }
}

KVFERRY_INLINE void prepare_socket(asio::ip::tcp::socket& socket, const SocketOptions& options, std::error_code& ec) {
  socket.non_blocking(true, ec);
  if (!ec) {
    socket.set_option(asio::ip::tcp::no_delay(true), ec);
  }
  if (ec) {
    return;
  }
  std::error_code ignored;
  if (options.send_buffer != 0) {
    socket.set_option(asio::socket_base::send_buffer_size(int_at_most(options.send_buffer, INT_MAX)), ignored);
  }
  if (options.receive_buffer != 0) {
    socket.set_option(asio::socket_base::receive_buffer_size(int_at_most(options.receive_buffer, INT_MAX)), ignored);
  }
  if (!options.congestion_control.empty()) {
    // It was checked before; it may have been forbidden since.
    (void)set_congestion_control(socket.native_handle(), options.congestion_control);
  } else if (!options.same_host_congestion_control.empty() && stays_on_host(socket)) {
    (void)set_congestion_control(socket.native_handle(), options.same_host_congestion_control);
  }
  if (options.user_timeout.count() > 0) {
    const auto time = static_cast<unsigned>(options.user_timeout.count());
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_USER_TIMEOUT, &time, sizeof(time));
  }
  if (options.keepalive_idle.count() > 0) {
    constexpr int interval_seconds = 5;
    constexpr int probes = 3;
    constexpr int longest_idle = 32767;  // which the kernel takes, in seconds
    const int idle = int_at_most(static_cast<std::uint64_t>(options.keepalive_idle.count()), longest_idle);
    socket.set_option(asio::socket_base::keep_alive(true), ignored);
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPINTVL, &interval_seconds, sizeof(interval_seconds));
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  }
}

}  // namespace kvferry::tcp
