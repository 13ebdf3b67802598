// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/name_resolution.hpp>

#include <sys/socket.h>

#include <asio/ip/address.hpp>
#include <asio/ip/tcp.hpp>

#include <algorithm>
#include <cerrno>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/operation.hpp>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/name_lookups.hpp>
#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

KVFERRY_INLINE bool is_bindable(const asio::ip::address& address) {
  const asio::ip::tcp::endpoint endpoint(address, 0);
  // A socket that takes no connections disturbs nobody.
  const Descriptor probe(::socket(endpoint.protocol().family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  return probe && ::bind(probe.get(), endpoint.data(), static_cast<socklen_t>(endpoint.size())) == 0;
}

}  // namespace internal

KVFERRY_INLINE HostPort listening_address(const HostPort& host, std::chrono::milliseconds patience) {
  // The system would listen there, and no connection would ever come.
  if (is_group(host.host)) {
    throw TransferError(errc::invalid_url, "cannot listen at " + host.to_string() +
                                               ": nobody accepts connections at the address of a group");
  }
  if (host.is_wildcard() || address_of(host.host)) {
    return host;
  }
  struct Answer {
    std::error_code ec;
    std::vector<asio::ip::address> addresses;
  };
  // Shared, for the resolver may be done when nobody waits any more.
  const auto found = std::make_shared<std::promise<Answer>>();
  auto future = found->get_future();
  const auto deadline = deadline_after(patience);
  NameLookups lookups;
  lookups.look_up(host.host, deadline, [found](std::error_code ec, const std::vector<asio::ip::address>& addresses) {
    found->set_value({ec, addresses});
  });
  if (future.wait_until(deadline) != std::future_status::ready) {
    throw TransferError(errc::timed_out, "the host to listen at, " + in_quotes(host.host) +
                                             ", was not resolved within " + std::to_string(patience.count()) + " ms");
  }
  const auto [ec, addresses] = future.get();
  if (addresses.empty()) {
    throw TransferError({EADDRNOTAVAIL, std::system_category()},
                        "cannot listen at " + host.to_string() + ": the host has no address: " + ec.message());
  }
  const auto worth = [](const asio::ip::address& address) {
    return std::tuple(!is_bindable(address), !address.is_v4(), address.is_loopback(), address);
  };
  return {std::ranges::min(addresses, {}, worth).to_string(), host.port};
}

}  // namespace kvferry::kit
