// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

#include <kvferry/config.hpp>
#include <kvferry/url.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The address at which to listen for a host: itself if it is a number or a wildcard; of a name's addresses one of this
/// host's, as the name may be one of several hosts. An IPv4 one if there is one, because peers without IPv6 can reach no
/// other, and those with it can reach either; and rather none of the loopback. In any order in which name servers tell the
/// same addresses, it is the same one: a channel's ports are looked up one after the other. Asks
/// name servers if it has to.
/// @throws TransferError `errc::timed_out` if that takes longer than `patience`; EADDRNOTAVAIL if the name has no address.
[[nodiscard]] KVFERRY_EXPORT HostPort listening_address(const HostPort& host, std::chrono::milliseconds patience);

}  // namespace kvferry::kit
