// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <system_error>
#include <vector>

#include <kvferry/url.hpp>

namespace kvferry::kit {

/// Whether a host is an IPv4 or IPv6 address rather than a name.
[[nodiscard]] bool is_numeric_host(const std::string& host);

/// The addresses of a host, as numbers, with its port. Asks name servers if it has to: may block for long.
[[nodiscard]] std::vector<HostPort> resolve(const HostPort& target, std::error_code& ec);

}  // namespace kvferry::kit
