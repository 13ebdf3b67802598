// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Has the CPU fetch the beginning of memory that is read soon. The CPU itself foresees what comes next, but only within a page
/// of memory. Nothing happens where there is no memory.
///
/// Always inline: GCC takes a function that only fetches for one without an effect, and leaves the call out.
[[gnu::always_inline]] inline void fetch_ahead(const void* memory, std::size_t bytes) noexcept {
  constexpr std::size_t page = 4096;
  constexpr std::size_t cache_line = 64;
  const auto* const begin = static_cast<const std::byte*>(memory);
  for (std::size_t at = 0; at < std::min(bytes, page); at += cache_line) {
    __builtin_prefetch(begin + at);
  }
}

}  // namespace kvferry
