// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_URL_HPP
#define KVFERRY_URL_HPP

#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A host and a port as users write them: `tcp://host:port` or `host:port`. An IPv6 host is in brackets,
/// `tcp://[::1]:5555`. A link-local one has the zone in which this host finds it, `tcp://[fe80::1%eth0]:5555`.
struct KVFERRY_EXPORT HostPort {
  std::string host;         ///< Without brackets. `*`, `0.0.0.0` and `::` mean all addresses when listening.
  std::uint16_t port = 0;   ///< 0 means any free port when listening.

  [[nodiscard]] bool is_ipv6_literal() const noexcept { return host.find(':') != std::string::npos; }
  /// Whether the host names no particular address: `*`, `0.0.0.0` or `::`, however they are spelled.
  [[nodiscard]] bool is_wildcard() const;
  /// `host:port`, IPv6 in brackets.
  [[nodiscard]] std::string to_string() const;
  /// `tcp://host:port`, IPv6 in brackets.
  [[nodiscard]] std::string to_url() const;

  friend bool operator==(const HostPort&, const HostPort&) = default;
};

/// Parses a url. On anything else `ec` becomes `errc::invalid_url` and the result is empty. A host that is an address
/// gets its usual spelling: `[::0]` becomes `::`, `0` becomes `0.0.0.0`, and an IPv4 address mapped to IPv6 becomes the
/// IPv4 address.
[[nodiscard]] KVFERRY_EXPORT HostPort parse_url(std::string_view url, std::error_code& ec);
/// As above. @throws TransferError `errc::invalid_url`, quoting the url and describing the error.
[[nodiscard]] KVFERRY_EXPORT HostPort parse_url(std::string_view url);

}  // namespace kvferry

#endif  // KVFERRY_URL_HPP
