// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/host_address.hpp>

#include <arpa/inet.h>
#include <net/if.h>

#include <asio/ip/address_v4.hpp>
#include <asio/ip/address_v6.hpp>

#include <algorithm>
#include <array>
#include <charconv>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {}  // namespace internal

KVFERRY_INLINE unsigned zone_index(const std::string& zone) {
  if (const unsigned named = ::if_nametoindex(zone.c_str()); named != 0) {
    return named;
  }
  unsigned index = 0;
  const auto* end = zone.data() + zone.size();
  const auto [stopped, error] = std::from_chars(zone.data(), end, index);
  std::array<char, IF_NAMESIZE> name{};
  const bool is_here = error == std::errc{} && stopped == end && ::if_indextoname(index, name.data()) != nullptr;
  return is_here ? index : 0;
}

KVFERRY_INLINE std::string_view zone_of(std::string_view host) noexcept {
  const auto percent = host.find('%');
  return percent == std::string_view::npos ? std::string_view() : host.substr(percent + 1);
}

KVFERRY_INLINE std::string without_zone(const std::string& host) { return host.substr(0, host.find('%')); }

KVFERRY_INLINE std::optional<asio::ip::address> address_of(std::string_view host) {
  if (host.find(':') != std::string_view::npos) {
    std::error_code ec;
    const auto address = asio::ip::make_address_v6(std::string(host.substr(0, host.find('%'))), ec);
    if (ec) {
      return std::nullopt;
    }
    if (address.is_v4_mapped()) {
      return asio::ip::make_address_v4(asio::ip::v4_mapped, address);
    }
    return address;
  }
  // Also "0", "127.1" and "0x7f000001", as getaddrinfo.
  in_addr number{};
  if (::inet_aton(std::string(host).c_str(), &number) == 0) {
    return std::nullopt;
  }
  return asio::ip::address_v4(ntohl(number.s_addr));
}

KVFERRY_INLINE bool lacks_zone(std::string_view host) {
  const auto address = address_of(host);
  return address && address->is_v6() && address->to_v6().is_link_local() && zone_of(host).empty();
}

KVFERRY_INLINE bool is_group(std::string_view host) {
  const auto address = address_of(host);
  return address && (address->is_multicast() || *address == asio::ip::address_v4::broadcast());
}

KVFERRY_INLINE std::string why_not_dialable(const HostPort& target) {
  if (target.is_wildcard() || target.port == 0) {
    return "it names no particular host and port";
  }
  if (is_group(target.host)) {
    return "nobody accepts connections at the address of a group";
  }
  if (lacks_zone(target.host)) {
    return "a link-local address needs a zone, as in [fe80::1%eth0]";
  }
  if (const std::string zone(zone_of(target.host)); !zone.empty() && zone_index(zone) == 0) {
    return "this host has no zone '" + zone + "'";
  }
  return {};
}

KVFERRY_INLINE std::string url_for_others(const std::string& url) {
  if (url.empty()) {
    return {};
  }
  const HostPort told = parse_url(url);
  return told.is_wildcard() || told.port == 0 ? std::string() : HostPort{without_zone(told.host), told.port}.to_url();
}

KVFERRY_INLINE std::string with_zone_of(const std::string& url, std::string_view seen_at) {
  std::error_code ec;
  const HostPort told = parse_url(url, ec);
  const HostPort seen = parse_url(seen_at, ec);
  if (zone_of(seen.host).empty() || !lacks_zone(told.host)) {
    return url;
  }
  return HostPort{told.host + '%' + std::string(zone_of(seen.host)), told.port}.to_url();
}

}  // namespace kvferry
