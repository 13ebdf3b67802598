// SPDX-License-Identifier: Apache-2.0
#include "name_resolution.hpp"

#include <asio/ip/address.hpp>

#include <algorithm>

#include "name_lookups.hpp"

namespace kvferry::kit {

bool is_numeric_host(const std::string& host) {
  asio::error_code ec;
  asio::ip::make_address(host, ec);
  return !ec;
}

HostPort listening_address(const HostPort& host) {
  if (host.is_wildcard() || is_numeric_host(host.host)) {
    return host;
  }
  std::error_code ec;
  const auto addresses = look_up(host.host, ec);
  if (addresses.empty()) {
    return host;
  }
  const auto ipv4 = std::ranges::find_if(addresses, &asio::ip::address::is_v4);
  return {(ipv4 != addresses.end() ? *ipv4 : addresses.front()).to_string(), host.port};
}

}  // namespace kvferry::kit
