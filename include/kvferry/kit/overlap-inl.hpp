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

/// Blocks of ranges that interleave count as if they overlapped: to tell them apart would take longer than the spreading
/// gains.
KVFERRY_INLINE bool any_ranges_overlap(std::span<const RemoteRange> ranges) {
  const auto end_of = [](const RemoteRange& range) {
    return range.offset + range.size + (range.count - 1) * range.stride;
  };
  const auto not_behind = [&](const RemoteRange& a, const RemoteRange& b) {
    return b.region < a.region || (b.region == a.region && b.offset < end_of(a));
  };
  const auto empty = [](const RemoteRange& range) { return range.size == 0 || range.count == 0; };
  if (std::ranges::none_of(ranges, empty) && std::ranges::adjacent_find(ranges, not_behind) == ranges.end()) {
    return false;
  }
  std::vector<RemoteRange> sorted(ranges.begin(), ranges.end());
  std::erase_if(sorted, empty);
  std::ranges::sort(sorted, [](const RemoteRange& a, const RemoteRange& b) {
    return a.region < b.region || (a.region == b.region && a.offset < b.offset);
  });
  return std::ranges::adjacent_find(sorted, not_behind) != sorted.end();
}

KVFERRY_INLINE bool any_buffers_overlap(std::span<const MutableBuffer> buffers) {
  const auto not_behind = [](const MutableBuffer& a, const MutableBuffer& b) { return b.data() < a.data() + a.size(); };
  if (std::ranges::adjacent_find(buffers, not_behind) == buffers.end()) {
    return false;
  }
  std::vector<MutableBuffer> sorted;
  sorted.reserve(buffers.size());
  std::ranges::copy_if(buffers, std::back_inserter(sorted),
                       [](const MutableBuffer& buffer) { return !buffer.empty(); });
  std::ranges::sort(sorted, {}, [](const MutableBuffer& buffer) { return buffer.data(); });
  return std::ranges::adjacent_find(sorted, not_behind) != sorted.end();
}

}  // namespace internal

KVFERRY_INLINE bool lands_on_itself(const TransferRequest& request) {
  if (request.kind == TransferKind::read) {
    return any_buffers_overlap(request.objects);
  }
  return request.remote_ranges.empty() ? any_page_twice(request.remote_indexes)
                                       : any_ranges_overlap(request.remote_ranges);
}

}  // namespace kvferry::kit
