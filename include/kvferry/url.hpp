// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>

namespace kvferry {

/// A host and a port as users write them: `tcp://host:port` or `host:port`; IPv6 hosts in brackets, `tcp://[::1]:5555`.
struct HostPort {
  std::string host;         ///< Without brackets. `*`, `0.0.0.0` and `::` mean all addresses when listening.
  std::uint16_t port = 0;   ///< 0 means any free port when listening.

  [[nodiscard]] bool is_ipv6_literal() const noexcept { return host.find(':') != std::string::npos; }
  /// Whether the host names no particular address: `*`, `0.0.0.0` or `::`.
  [[nodiscard]] bool is_wildcard() const noexcept { return host == "*" || host == "0.0.0.0" || host == "::"; }
  /// `host:port`, IPv6 in brackets.
  [[nodiscard]] std::string to_string() const;
  /// `tcp://host:port`, IPv6 in brackets.
  [[nodiscard]] std::string to_url() const;

  friend bool operator==(const HostPort&, const HostPort&) = default;
};

/// Parses a url. On anything else `ec` becomes `errc::invalid_url` and the result is empty.
[[nodiscard]] HostPort parse_url(std::string_view url, std::error_code& ec);
/// As above. @throws TransferError `errc::invalid_url`, quoting the url and saying what is wrong with it.
[[nodiscard]] HostPort parse_url(std::string_view url);

}  // namespace kvferry
