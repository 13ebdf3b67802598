// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/address.hpp>

#include <optional>
#include <string>
#include <string_view>

#include <kvferry/url.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The address that a host is, in any spelling that the system's resolver takes for one; nothing for a name and for
/// `*`. IPv4 mapped into IPv6 is IPv4. A zone is left out.
[[nodiscard]] std::optional<asio::ip::address> address_of(std::string_view host);

/// The zone of an IPv6 address, after its `%`; empty if there is none. It names a device of one host.
[[nodiscard]] std::string_view zone_of(std::string_view host) noexcept;
/// The number of the device that a zone names, by its name or by its number; 0 if this host has none of it.
[[nodiscard]] unsigned zone_index(const std::string& zone);
[[nodiscard]] std::string without_zone(const std::string& host);

/// Whether the host is an address that means nothing without a zone, and has none.
[[nodiscard]] bool lacks_zone(std::string_view host);

/// Whether the host is an address at which nobody accepts connections: of a group of hosts, or of all.
[[nodiscard]] bool is_group(std::string_view host);

/// Why nothing can be connected to there from this host; empty if something may.
[[nodiscard]] std::string why_not_dialable(const HostPort& target);

/// The url as another host may use it: without a zone of this one's. Empty if nobody could: it is a wildcard, or has no
/// port.
/// @param url one that `parse_url` takes.
[[nodiscard]] std::string url_for_others(const std::string& url);

/// The url with the zone in which the peer was seen, if its host needs one and lacks it.
/// @param seen_at `host:port`
[[nodiscard]] std::string with_zone_of(const std::string& url, std::string_view seen_at);

}  // namespace kvferry
