// SPDX-License-Identifier: Apache-2.0
#include "name_resolution.hpp"

#include <asio/ip/address.hpp>

#include <algorithm>

#include "host_address.hpp"
#include "name_lookups.hpp"

namespace kvferry::kit {

HostPort listening_address(const HostPort& host) {
  if (host.is_wildcard() || address_of(host.host)) {
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
