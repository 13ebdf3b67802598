// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Editors of Windows put it before a text in UTF-8.
inline constexpr std::string_view byte_order_mark = "\xef\xbb\xbf";

[[nodiscard]] bool is_utf8(std::string_view text) noexcept;

/// Whether a UTF-8 text has a control character: U+0000 to U+001F, or U+007F to U+009F.
[[nodiscard]] bool has_control_character(std::string_view text) noexcept;

/// Why this is no id of a channel's - "is not UTF-8" -, but for an empty one; empty if it is one.
[[nodiscard]] std::string why_no_id(std::string_view id);

/// A text that somebody else wrote, fit for one line: control characters, what isn't UTF-8, and the characters of `also`
/// come as `\xNN`, a byte each. If it has more than `longest` bytes, "..." stands for the rest.
[[nodiscard]] std::string escaped(std::string_view text, std::size_t longest, std::string_view also = {});

/// A peer's text as errors show it: at most 100 bytes, escaped, between single quotes.
[[nodiscard]] std::string in_quotes(std::string_view text);

}  // namespace kvferry
