// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>

#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The origin that connections are counted by: an IPv4 address, also where it is mapped into IPv6, or the first half of
/// an IPv6 address, for whoever has one has a whole network of them.
[[nodiscard]] std::string source_of(const sockaddr& address);

}  // namespace kvferry
