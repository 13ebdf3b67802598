// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/side_message.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace example {

/// The peers' names for each other.
inline constexpr std::string_view prefill_id = "prefill";
inline constexpr std::string_view decode_id = "decode";

/// How the pages travel.
inline constexpr std::string_view mode_write = "write";        ///< Prefill writes into decode's pages.
inline constexpr std::string_view mode_read = "read";          ///< Decode reads prefill's pages.
inline constexpr std::string_view mode_sendrecv = "sendrecv";  ///< Prefill sends, decode receives; paired by tag.

/// Describes the cache that prefill has. Answered with `CacheAccepted`, or with an error.
struct CacheOffer {
  std::string mode;
  std::uint64_t bytes = 0;
  std::uint64_t page_size = 0;
  std::uint64_t pages_per_batch = 0;
  std::string checksum;

  static constexpr std::string_view side_message_type = "ExampleCacheOffer";
  static constexpr auto side_message_fields() {
    return std::tuple(kvferry::side_message_field("mode", &CacheOffer::mode),
                      kvferry::side_message_field("bytes", &CacheOffer::bytes),
                      kvferry::side_message_field("page_size", &CacheOffer::page_size),
                      kvferry::side_message_field("pages_per_batch", &CacheOffer::pages_per_batch),
                      kvferry::side_message_field("checksum", &CacheOffer::checksum));
  }
};

/// Decode has taken pages for the cache out of its pool.
struct CacheAccepted {
  std::uint64_t page_count = 0;

  static constexpr std::string_view side_message_type = "ExampleCacheAccepted";
  static constexpr auto side_message_fields() {
    return std::tuple(kvferry::side_message_field("page_count", &CacheAccepted::page_count));
  }
};

/// Part of a page table: page `first + i` of the cache lies at page `indexes[i]` of the sender's pool. Prefill sends
/// its own and is answered with the same part of decode's. (In parts, because a side message may have 1 MiB at most.)
struct PageTablePart {
  std::uint64_t first = 0;
  std::vector<std::uint64_t> indexes;

  static constexpr std::string_view side_message_type = "ExamplePageTablePart";
  static constexpr auto side_message_fields() {
    return std::tuple(kvferry::side_message_field("first", &PageTablePart::first),
                      kvferry::side_message_field("indexes", &PageTablePart::indexes));
  }

  /// Indexes take at most 9 bytes each in msgpack.
  static constexpr std::size_t max_indexes = 65'536;
};

/// Tags of sends and recvs. Batch n of a cache has tag n; what else there is counts down from the largest.
inline constexpr std::uint64_t tag_verdict = std::numeric_limits<std::uint64_t>::max();  ///< What arrived at decode.

}  // namespace example
