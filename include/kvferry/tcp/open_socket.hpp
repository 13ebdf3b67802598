// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/tcp.hpp>

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include <kvferry/config.hpp>

#include <kvferry/detail/standard_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Gives a descriptor to a socket or an acceptor, or closes it.
template <class AsioSocket>
void assign_or_close(AsioSocket& socket, const asio::ip::tcp& protocol, int descriptor, std::error_code& ec) {
  try {
    socket.assign(protocol, descriptor, ec);
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  if (ec) {
    ::close(descriptor);
  }
}

/// Opens a socket or an acceptor that programs which this process starts don't inherit. Asio's own `open` lets them, and
/// such a program then keeps the port in use, and the peer waiting, for as long as it runs.
template <class AsioSocket>
void open_socket(AsioSocket& socket, const asio::ip::tcp& protocol, std::error_code& ec) {
  occupy_standard_descriptors();
  const int descriptor = ::socket(protocol.family(), SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP);
  if (descriptor == -1) {
    ec.assign(errno, std::system_category());
    return;
  }
  assign_or_close(socket, protocol, descriptor, ec);
}

/// Takes a connection that waits at the acceptor, again not to be inherited. The acceptor must not block: if no connection
/// waits, `ec` is `std::errc::operation_would_block`.
[[nodiscard]] inline asio::ip::tcp::socket accept_socket(asio::ip::tcp::acceptor& acceptor, std::error_code& ec) {
  occupy_standard_descriptors();
  asio::ip::tcp::socket socket(acceptor.get_executor());
  sockaddr_storage remote{};
  socklen_t size = sizeof(remote);
  const int descriptor =
      ::accept4(acceptor.native_handle(), reinterpret_cast<sockaddr*>(&remote), &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (descriptor == -1) {
    ec.assign(errno, std::system_category());
    return socket;
  }
  assign_or_close(socket, remote.ss_family == AF_INET6 ? asio::ip::tcp::v6() : asio::ip::tcp::v4(), descriptor, ec);
  return socket;
}

}  // namespace kvferry::tcp
