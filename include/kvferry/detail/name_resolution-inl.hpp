// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/name_resolution.hpp>

#include <asio/ip/address.hpp>

#include <algorithm>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/operation.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/name_lookups.hpp>
#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE HostPort listening_address(const HostPort& host, std::chrono::milliseconds patience) {
  if (host.is_wildcard() || address_of(host.host)) {
    return host;
  }
  using Addresses = std::vector<asio::ip::address>;
  // Shared, for the resolver may be done when nobody waits any more.
  const auto found = std::make_shared<std::promise<Addresses>>();
  auto future = found->get_future();
  const auto deadline = deadline_after(patience);
  NameLookups lookups;
  lookups.look_up(host.host, deadline,
                  [found](std::error_code, const Addresses& addresses) { found->set_value(addresses); });
  if (future.wait_until(deadline) != std::future_status::ready) {
    throw TransferError(errc::timed_out, "the host to listen at, " + in_quotes(host.host) +
                                             ", was not resolved within " + std::to_string(patience.count()) + " ms");
  }
  const Addresses addresses = future.get();
  if (addresses.empty()) {
    return host;
  }
  const auto ipv4 = std::ranges::find_if(addresses, &asio::ip::address::is_v4);
  return {(ipv4 != addresses.end() ? *ipv4 : addresses.front()).to_string(), host.port};
}

}  // namespace kvferry::kit
