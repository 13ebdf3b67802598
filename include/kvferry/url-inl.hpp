// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <algorithm>
#include <charconv>
#include <optional>

#include <kvferry/detail/host_address.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

inline constexpr std::string_view scheme = "tcp://";
inline constexpr std::size_t longest_url = 512;
inline constexpr std::size_t longest_host = 253;  // RFC 1035
inline constexpr std::size_t longest_zone = 15;   // a device's name, IF_NAMESIZE

/// Says what is wrong with a url; nothing if it is in order.
using Problem = std::string_view;

KVFERRY_INLINE bool is_host_character(char c) noexcept {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
}

KVFERRY_INLINE Problem parse_port(std::string_view text, std::uint16_t& port) {
  const auto* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, port);
  if (text.empty() || error != std::errc{} || stopped != end) {
    return "the port is not a number from 0 to 65535";
  }
  return {};
}

KVFERRY_INLINE Problem parse_bracketed_host(std::string_view text, HostPort& result) {
  const auto bracket = text.find(']');
  if (bracket == std::string_view::npos) {
    return "the closing bracket is missing";
  }
  const auto host = text.substr(1, bracket - 1);
  const auto address = host.find(':') == std::string_view::npos ? std::nullopt : address_of(host);
  if (!address) {
    return "what is in brackets is not an IPv6 address";
  }
  result.host = address->to_string();
  if (host.find('%') != std::string_view::npos) {
    const auto zone = zone_of(host);
    if (zone.empty() || zone.size() > longest_zone || !std::ranges::all_of(zone, is_host_character)) {
      return "the zone is not the name or number of a device";
    }
    if (!lacks_zone(result.host)) {
      return "only a link-local address has a zone";
    }
    result.host.append("%").append(zone);
  }
  if (text.substr(bracket + 1, 1) != ":") {
    return "the port is missing";
  }
  return parse_port(text.substr(bracket + 2), result.port);
}

KVFERRY_INLINE Problem parse_plain_host(std::string_view text, HostPort& result) {
  const auto colon = text.find(':');
  if (colon == std::string_view::npos) {
    return "the port is missing";
  }
  if (colon != text.rfind(':')) {
    return "an IPv6 address needs brackets";
  }
  result.host = text.substr(0, colon);
  if (result.host.empty()) {
    return "the host is missing";
  }
  if (result.host != "*" && !std::ranges::all_of(result.host, is_host_character)) {
    return "the host has a character that no host name has";
  }
  if (result.host.size() > longest_host) {
    return "the host is longer than 253 characters";
  }
  if (result.host.starts_with('.') || result.host.find("..") != std::string::npos) {
    return "a part of the host's name is empty";
  }
  if (const auto address = address_of(result.host)) {
    result.host = address->to_string();
  } else if (std::ranges::all_of(result.host, [](char c) { return (c >= '0' && c <= '9') || c == '.'; })) {
    return "the host is not an IPv4 address";
  }
  return parse_port(text.substr(colon + 1), result.port);
}

KVFERRY_INLINE Problem parse(std::string_view url, HostPort& result) {
  if (url.empty()) {
    return "it is empty";
  }
  if (url.size() > longest_url) {
    return "it is longer than 512 characters";
  }
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  if (std::ranges::equal(url.substr(0, scheme.size()), scheme, {}, lower)) {
    url.remove_prefix(scheme.size());
  } else if (url.find("://") != std::string_view::npos) {
    return "the scheme is not tcp";
  }
  return url.starts_with('[') ? parse_bracketed_host(url, result) : parse_plain_host(url, result);
}

/// The url as far as it can be shown on one line of a log.
KVFERRY_INLINE std::string quote(std::string_view url) {
  constexpr std::size_t longest_quote = 128;
  std::string text(url.substr(0, longest_quote));
  std::ranges::replace_if(
      text, [](char c) { return c < ' ' || c > '~'; }, '?');
  return '"' + text + (url.size() > longest_quote ? "...\"" : "\"");
}

}  // namespace internal

KVFERRY_INLINE bool HostPort::is_wildcard() const {
  const auto address = address_of(host);
  return host == "*" || (address && address->is_unspecified());
}

KVFERRY_INLINE std::string HostPort::to_string() const {
  const auto text = is_ipv6_literal() ? '[' + host + ']' : host;
  return text + ':' + std::to_string(port);
}

KVFERRY_INLINE std::string HostPort::to_url() const { return std::string(scheme) + to_string(); }

KVFERRY_INLINE HostPort parse_url(std::string_view url, std::error_code& ec) {
  HostPort result;
  if (!parse(url, result).empty()) {
    ec = errc::invalid_url;
    return {};
  }
  ec.clear();
  return result;
}

KVFERRY_INLINE HostPort parse_url(std::string_view url) {
  HostPort result;
  if (const auto problem = parse(url, result); !problem.empty()) {
    throw TransferError(errc::invalid_url, "url " + quote(url) + ": " + std::string(problem));
  }
  return result;
}

}  // namespace kvferry
