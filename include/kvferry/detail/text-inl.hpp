// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/text.hpp>

#include <cstddef>

#include <kvferry/log.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE unsigned byte_at(std::string_view text, std::size_t i) noexcept {
  return static_cast<unsigned char>(text[i]);
}

/// The size of the UTF-8 character at the text's beginning; 0 if there is none.
KVFERRY_INLINE std::size_t first_character(std::string_view text) noexcept {
  const unsigned lead = byte_at(text, 0);
  const std::size_t size = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
  if (size == 0 || text.size() < size) {
    return 0;
  }
  for (std::size_t next = 1; next < size; ++next) {
    if ((byte_at(text, next) & 0xC0U) != 0x80) {
      return 0;
    }
  }
  if (size > 2) {
    // Longer than necessary, a surrogate, or behind the last code point.
    const unsigned second = byte_at(text, 1);
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) || (lead == 0xF0 && second < 0x90) ||
        (lead == 0xF4 && second > 0x8F)) {
      return 0;
    }
  }
  return size;
}

KVFERRY_INLINE bool is_control(std::string_view character) noexcept {
  const unsigned lead = byte_at(character, 0);
  return lead < 0x20 || lead == 0x7F || (character.size() == 2 && lead == 0xC2 && byte_at(character, 1) < 0xA0);
}

}  // namespace internal

KVFERRY_INLINE bool is_utf8(std::string_view text) noexcept {
  while (!text.empty()) {
    const std::size_t size = first_character(text);
    if (size == 0) {
      return false;
    }
    text.remove_prefix(size);
  }
  return true;
}

KVFERRY_INLINE bool has_control_character(std::string_view text) noexcept {
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (is_control(text.substr(i, 2).size() == 2 && byte_at(text, i) == 0xC2 ? text.substr(i, 2) : text.substr(i, 1))) {
      return true;
    }
  }
  return false;
}

KVFERRY_INLINE std::string why_no_id(std::string_view id) {
  if (id.size() > max_peer_id_bytes) {
    return "has " + std::to_string(id.size()) + " bytes, at most " + std::to_string(max_peer_id_bytes);
  }
  return !is_utf8(id) ? "is not UTF-8" : has_control_character(id) ? "has a control character" : "";
}

KVFERRY_INLINE std::string escaped(std::string_view text, std::size_t longest, std::string_view also) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string line;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t size = first_character(text.substr(i));
    const std::string_view character = text.substr(i, size == 0 ? 1 : size);
    i += character.size();
    if (i > longest) {
      return line + "...";
    }
    if (size != 0 && !is_control(character) && also.find(character) == std::string_view::npos) {
      line.append(character);
      continue;
    }
    for (std::size_t j = 0; j < character.size(); ++j) {
      const unsigned byte = byte_at(character, j);
      line.append("\\x").append(1, digits[byte >> 4U]).append(1, digits[byte & 0xFU]);
    }
  }
  return line;
}

KVFERRY_INLINE std::string in_quotes(std::string_view text) {
  std::string line = "'";
  return line.append(printable(text)).append(1, '\'');
}

}  // namespace kvferry
