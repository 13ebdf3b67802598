// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/side_message_codec.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace example {

/// The cache of a model with two layers, of which a page holds 16 tokens.
constexpr std::size_t layers = 2;
constexpr std::size_t tokens_of_page = 16;
constexpr std::size_t page_size = 16 * 1024;

constexpr std::size_t pages_of_layer(std::size_t tokens) { return (tokens + tokens_of_page - 1) / tokens_of_page; }

/// Asks prefill to compute a prompt, and to write its cache to these pages of decode's. Answered with the same message.
struct PrefillRequest {
  std::uint64_t number = 0;
  std::string decode_id;
  std::uint64_t incarnation = 0;  ///< Decode's own: the pages are of this run of its.
  std::vector<std::uint32_t> prompt;
  std::vector<std::uint64_t> pages;  ///< `layers` times `pages_of_layer(prompt.size())`.

  static constexpr std::string_view side_message_type = "ExamplePrefillRequest";
  static constexpr auto side_message_fields() {
    return std::tuple(kvferry::side_message_field("number", &PrefillRequest::number),
                      kvferry::side_message_field("decode_id", &PrefillRequest::decode_id),
                      kvferry::side_message_field("incarnation", &PrefillRequest::incarnation),
                      kvferry::side_message_field("prompt", &PrefillRequest::prompt),
                      kvferry::side_message_field("pages", &PrefillRequest::pages));
  }
};

/// A page of the model's, which is the same byte all over.
inline std::byte state_of(const std::vector<std::uint32_t>& prompt, std::size_t page, std::size_t layer) {
  return std::byte(prompt[page * tokens_of_page] * 31 + layer * 7 + 1);
}

}  // namespace example
