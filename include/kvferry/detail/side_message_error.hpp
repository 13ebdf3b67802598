// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include <kvferry/error.hpp>
#include <kvferry/side_message.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/error_codes.hpp>
#include <kvferry/detail/text.hpp>

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

/// The answer that refuses a request. Its sentence may be a user's exception's: escaped, because a text that is not UTF-8
/// would make the answer malformed, and cut, because an answer over the limit is not sent. The code would be lost.
[[nodiscard]] inline SideMessage refusal(errc code, std::string_view sentence) {
  constexpr std::size_t longest = 1000;
  return encode_side_message(SideMessageError{static_cast<std::int64_t>(code), escaped(sentence, longest)});
}

}  // namespace kvferry::kit
