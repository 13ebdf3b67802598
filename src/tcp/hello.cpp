// SPDX-License-Identifier: Apache-2.0
#include "hello.hpp"

#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <cerrno>

namespace kvferry::tcp {

Secret random_secret() {
  Secret secret;
  // Up to 256 bytes come whole and uninterrupted (getrandom(2)).
  if (::getrandom(secret.data(), secret.size(), 0) != static_cast<ssize_t>(secret.size())) {
    throw std::system_error(errno, std::system_category(), "getrandom");
  }
  return secret;
}

bool equal(const Secret& a, const Secret& b) noexcept {
  std::byte difference{0};
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= a[i] ^ b[i];
  }
  return difference == std::byte{0};
}

void prepare_socket(asio::ip::tcp::socket& socket, const SocketOptions& options, std::error_code& ec) {
  socket.non_blocking(true, ec);
  if (!ec) {
    socket.set_option(asio::ip::tcp::no_delay(true), ec);
  }
  if (ec) {
    return;
  }
  std::error_code ignored;
  if (options.send_buffer != 0) {
    socket.set_option(asio::socket_base::send_buffer_size(static_cast<int>(options.send_buffer)), ignored);
  }
  if (options.receive_buffer != 0) {
    socket.set_option(asio::socket_base::receive_buffer_size(static_cast<int>(options.receive_buffer)), ignored);
  }
  if (options.keepalive_idle.count() > 0) {
    constexpr int interval_seconds = 5;
    constexpr int probes = 3;
    const int idle = static_cast<int>(options.keepalive_idle.count());
    socket.set_option(asio::socket_base::keep_alive(true), ignored);
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPINTVL, &interval_seconds, sizeof(interval_seconds));
    ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  }
}

}  // namespace kvferry::tcp
