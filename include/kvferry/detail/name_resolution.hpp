// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

#include <kvferry/config.hpp>
#include <kvferry/url.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The address at which to listen for a host: itself if it is a number or a wildcard; of a name's addresses an IPv4 one
/// if there is one, because peers without IPv6 can reach no other, and those with it can reach either. The name itself
/// if it has none. Asks name servers if it has to.
/// @throws TransferError `errc::timed_out` if that takes longer than `patience`.
[[nodiscard]] KVFERRY_EXPORT HostPort listening_address(const HostPort& host, std::chrono::milliseconds patience);

}  // namespace kvferry::kit
