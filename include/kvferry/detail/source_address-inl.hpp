// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/source_address.hpp>

#include <arpa/inet.h>
#include <netinet/in.h>

#include <array>
#include <cstring>

namespace kvferry::inline KVFERRY_ABI {

KVFERRY_INLINE std::string source_of(const sockaddr& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (address.sa_family == AF_INET) {
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(address).sin_addr, text.data(), text.size());
    return text.data();
  }
  auto ipv6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(&ipv6)) {
    ::inet_ntop(AF_INET, &ipv6.s6_addr[12], text.data(), text.size());
    return text.data();
  }
  std::memset(&ipv6.s6_addr[8], 0, 8);
  ::inet_ntop(AF_INET6, &ipv6, text.data(), text.size());
  return std::string(text.data()) + "/64";
}

}  // namespace kvferry
