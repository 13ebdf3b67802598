// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/overlap.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// A page is written from its beginning, so that one index twice is an overlap.
KVFERRY_INLINE bool any_page_twice(std::span<const std::uint64_t> indexes) {
  if (std::ranges::adjacent_find(indexes, std::ranges::greater_equal()) == indexes.end()) {
    return false;  // rising, as batches often are
  }
  const auto [lowest, highest] = std::ranges::minmax(indexes);
  constexpr std::size_t bits = 64;
  if ((highest - lowest) / bits <= 4 * indexes.size()) {
    std::vector<std::uint64_t> seen((highest - lowest) / bits + 1);
    for (const std::uint64_t index : indexes) {
      std::uint64_t& word = seen[(index - lowest) / bits];
      const std::uint64_t bit = std::uint64_t{1} << ((index - lowest) % bits);
      if ((word & bit) != 0) {
        return true;
      }
      word |= bit;
    }
    return false;
  }
  std::vector<std::uint64_t> sorted(indexes.begin(), indexes.end());
  std::ranges::sort(sorted);
  return std::ranges::adjacent_find(sorted) != sorted.end();
}

KVFERRY_INLINE bool any_buffers_overlap(std::span<const MutableBuffer> buffers) {
  const auto not_behind = [](const MutableBuffer& a, const MutableBuffer& b) { return b.data() < a.data() + a.size(); };
  if (std::ranges::adjacent_find(buffers, not_behind) == buffers.end()) {
    return false;
  }
  std::vector<MutableBuffer> sorted;
  sorted.reserve(buffers.size());
  std::ranges::copy_if(buffers, std::back_inserter(sorted), [](const MutableBuffer& buffer) { return !buffer.empty(); });
  std::ranges::sort(sorted, {}, [](const MutableBuffer& buffer) { return buffer.data(); });
  return std::ranges::adjacent_find(sorted, not_behind) != sorted.end();
}

}  // namespace internal

KVFERRY_INLINE bool lands_on_itself(const TransferRequest& request) {
  return request.kind == TransferKind::write ? any_page_twice(request.remote_indexes)
                                             : any_buffers_overlap(request.objects);
}

}  // namespace kvferry::kit
