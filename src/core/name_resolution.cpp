// SPDX-License-Identifier: Apache-2.0
#include "name_resolution.hpp"

#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/system_executor.hpp>

#include <algorithm>

namespace kvferry::kit {

bool is_numeric_host(const std::string& host) {
  asio::error_code ec;
  asio::ip::make_address(host, ec);
  return !ec;
}

std::vector<HostPort> resolve(const HostPort& target, std::error_code& ec) {
  using Resolver = asio::ip::basic_resolver<asio::ip::tcp, asio::system_executor>;
  Resolver resolver{asio::system_executor()};
  std::vector<HostPort> addresses;
  for (const auto& entry : resolver.resolve(target.host, std::to_string(target.port), Resolver::numeric_service, ec)) {
    addresses.push_back({entry.endpoint().address().to_string(), target.port});
  }
  return addresses;
}

HostPort listening_address(const HostPort& host) {
  if (host.is_wildcard() || is_numeric_host(host.host)) {
    return host;
  }
  std::error_code ec;
  const auto addresses = resolve(host, ec);
  const auto ipv4 = std::ranges::find_if_not(addresses, &HostPort::is_ipv6_literal);
  return addresses.empty() ? host : ipv4 != addresses.end() ? *ipv4 : addresses.front();
}

}  // namespace kvferry::kit
