// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/error.hpp>
#include <kvferry/side_message.hpp>

#include <kvferry/detail/error_codes.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Translates a peer's error for this side. The peer's own end is not this side's: `errc::closed` from here would say
/// that this channel was closed.
[[nodiscard]] inline errc code_of(const SideMessageError& error) noexcept {
  if (!is_errc(error.code)) {
    return errc::handshake_failed;
  }
  switch (const auto code = static_cast<errc>(error.code)) {
    case errc::closed: return errc::peer_closed;
    case errc::cancelled: return errc::peer_cancelled;
    case errc::forked: return errc::handshake_failed;
    default: return code;
  }
}

}  // namespace kvferry::kit
