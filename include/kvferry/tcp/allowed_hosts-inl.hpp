// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/allowed_hosts.hpp>

#include <ifaddrs.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

KVFERRY_INLINE asio::ip::address_v6::bytes_type bytes_of(const asio::ip::address& address) {
  return address.is_v4() ? asio::ip::make_address_v6(asio::ip::v4_mapped, address.to_v4()).to_bytes()
                         : address.to_v6().to_bytes();
}

KVFERRY_INLINE bool have_equal_beginnings(const asio::ip::address_v6::bytes_type& a,
                                          const asio::ip::address_v6::bytes_type& b, unsigned bits) {
  const std::size_t whole = bits / 8;
  if (std::memcmp(a.data(), b.data(), whole) != 0) {
    return false;
  }
  const unsigned rest = bits % 8;
  return rest == 0 || (a.at(whole) ^ b.at(whole)) >> (8 - rest) == 0;
}

KVFERRY_INLINE bool is_of_this_host(const asio::ip::address& address) {
  if (address.is_loopback()) {
    return true;
  }
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) {
    return false;
  }
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owned(list, &::freeifaddrs);
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr) {
      continue;
    }
    if (address.is_v4() && entry->ifa_addr->sa_family == AF_INET) {
      sockaddr_in own{};
      std::memcpy(&own, entry->ifa_addr, sizeof(own));
      if (ntohl(own.sin_addr.s_addr) == address.to_v4().to_uint()) {
        return true;
      }
    } else if (address.is_v6() && entry->ifa_addr->sa_family == AF_INET6) {
      sockaddr_in6 own{};
      std::memcpy(&own, entry->ifa_addr, sizeof(own));
      const auto bytes = address.to_v6().to_bytes();
      if (std::memcmp(&own.sin6_addr, bytes.data(), bytes.size()) == 0) {
        return true;
      }
    }
  }
  return false;
}

KVFERRY_INLINE std::string lower(std::string text) {
  std::ranges::transform(text, text.begin(),
                         [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return text;
}

}  // namespace internal

KVFERRY_INLINE AllowedHosts::AllowedHosts(const std::vector<std::string>& entries) {
  for (const auto& entry : entries) {
    add(entry);
  }
}

KVFERRY_INLINE void AllowedHosts::add(const std::string& entry) {
  if (entry == "*") {
    all_ = true;
    return;
  }
  const auto slash = entry.find('/');
  const std::string host = entry.substr(0, slash);
  if (const auto address = address_of(host)) {
    constexpr unsigned all_bits = 128;
    const unsigned ignored = address->is_v4() ? 96 : 0;  // of an IPv4 address mapped into IPv6
    unsigned bits = all_bits - ignored;
    if (slash != std::string::npos) {
      const char* end = entry.data() + entry.size();
      unsigned given = 0;
      const auto [stopped, error] = std::from_chars(entry.data() + slash + 1, end, given);
      if (error != std::errc{} || stopped != end || given > bits) {
        throw TransferError(errc::invalid_url, "allowed host " + in_quotes(entry) +
                                                   ": the length of the range is not a number from 0 to " +
                                                   std::to_string(bits));
      }
      bits = given;
    }
    ranges_.push_back({bytes_of(*address), ignored + bits});
    return;
  }
  std::error_code ec;
  (void)parse_url(host + ":1", ec);
  if (ec || slash != std::string::npos || host.starts_with('[')) {
    throw TransferError(errc::invalid_url,
                        "allowed host " + in_quotes(entry) + ": it is no host, address or range of addresses");
  }
  names_.push_back(lower(host));
}

KVFERRY_INLINE bool AllowedHosts::allow(const std::string& told, const std::string& reached) const {
  const auto address = address_of(told);
  if (all_) {
    return true;
  }
  if (!address) {
    return std::ranges::find(names_, lower(told)) != names_.end();
  }
  const auto bytes = bytes_of(*address);
  if (std::ranges::any_of(
          ranges_, [&](const Range& range) { return have_equal_beginnings(bytes, range.network, range.bits); })) {
    return true;
  }
  const auto answered_at = address_of(reached);
  return answered_at && (*answered_at == *address || (is_of_this_host(*answered_at) && is_of_this_host(*address)));
}

}  // namespace kvferry::tcp
