// SPDX-License-Identifier: Apache-2.0
#include "name_resolution.hpp"

#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/system_executor.hpp>

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

}  // namespace kvferry::kit
