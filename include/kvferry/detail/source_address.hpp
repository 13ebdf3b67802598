// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/socket.h>

#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// What connections from an address have in common with others of the same origin: an IPv4 address, also where it is mapped
/// into IPv6, or the first half of an IPv6 address, for whoever has one has a whole network of them.
[[nodiscard]] std::string source_of(const sockaddr& address);

}  // namespace kvferry
