// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/listening_socket.hpp>

#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <system_error>

#include <kvferry/detail/host_address.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

/// @return the length, or nothing if the host is no number.
KVFERRY_INLINE std::optional<socklen_t> socket_address(const HostPort& from, sockaddr_storage& to) {
  const auto number =
      from.host == "*" ? std::optional<asio::ip::address>(asio::ip::address_v6::any()) : address_of(from.host);
  if (!number) {
    return std::nullopt;
  }
  if (number->is_v4()) {
    auto& ipv4 = reinterpret_cast<sockaddr_in&>(to);
    ipv4.sin_family = AF_INET;
    ipv4.sin_port = htons(from.port);
    const auto bytes = number->to_v4().to_bytes();
    std::memcpy(&ipv4.sin_addr, bytes.data(), bytes.size());
    return static_cast<socklen_t>(sizeof(ipv4));
  }
  auto& ipv6 = reinterpret_cast<sockaddr_in6&>(to);
  ipv6.sin6_family = AF_INET6;
  ipv6.sin6_port = htons(from.port);
  const auto bytes = number->to_v6().to_bytes();
  std::memcpy(&ipv6.sin6_addr, bytes.data(), bytes.size());
  if (const auto zone = zone_of(from.host); !zone.empty()) {
    ipv6.sin6_scope_id = zone_index(std::string(zone));
  }
  return static_cast<socklen_t>(sizeof(ipv6));
}

KVFERRY_INLINE Descriptor bound_socket(const sockaddr_storage& address, socklen_t size) {
  Descriptor listener(::socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP));
  if (!listener) {
    return listener;
  }
  set_option(listener.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.ss_family == AF_INET6) {
    set_option(listener.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
  }
  // The system cuts the backlog down to its own maximum.
  if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0 ||
      ::listen(listener.get(), std::numeric_limits<int>::max()) != 0) {
    const int error = errno;
    listener.reset();
    errno = error;
  }
  return listener;
}

}  // namespace internal

KVFERRY_INLINE void set_option(int descriptor, int level, int name, int value) noexcept {
  ::setsockopt(descriptor, level, name, &value, sizeof(value));
}

KVFERRY_INLINE ListeningSocket listen_at(const HostPort& address) {
  sockaddr_storage where{};
  auto size = socket_address(address, where);
  if (!size) {
    throw std::system_error(EADDRNOTAVAIL, std::system_category(), "not an address");
  }
  ListeningSocket listener{bound_socket(where, *size)};
  if (!listener.descriptor && address.host == "*") {
    // A system without IPv6.
    size = socket_address({"0.0.0.0", address.port}, where = {});
    listener.descriptor = bound_socket(where, *size);
  }
  if (!listener.descriptor) {
    throw std::system_error(errno, std::system_category(), "cannot listen");
  }
  ::getsockname(listener.descriptor.get(), reinterpret_cast<sockaddr*>(&where), &*size);
  listener.port = ntohs(where.ss_family == AF_INET ? reinterpret_cast<sockaddr_in&>(where).sin_port
                                                   : reinterpret_cast<sockaddr_in6&>(where).sin6_port);
  return listener;
}

}  // namespace kvferry
