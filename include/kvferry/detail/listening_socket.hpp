// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <kvferry/url.hpp>

#include <kvferry/detail/descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A socket to which others may connect; it doesn't block.
struct ListeningSocket {
  Descriptor descriptor;
  std::uint16_t port = 0;
};

/// @param address whose host is a number, or "*" for all addresses of both families; port 0 for any.
/// @throws std::system_error with the errno of what failed.
[[nodiscard]] ListeningSocket listen_at(const HostPort& address);

/// setsockopt(2); what the system doesn't know is left out.
void set_option(int descriptor, int level, int name, int value) noexcept;

}  // namespace kvferry
