// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/channel_stats.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

namespace kvferry::inline KVFERRY_ABI {

KVFERRY_INLINE std::chrono::nanoseconds LatencyHistogram::upper_bound(std::size_t index) noexcept {
  return index + 1 < bucket_count ? std::chrono::microseconds(std::uint64_t{1} << index)
                                  : std::chrono::nanoseconds::max();
}

KVFERRY_INLINE std::size_t LatencyHistogram::bucket_of(std::chrono::nanoseconds duration) noexcept {
  const auto microseconds = std::chrono::ceil<std::chrono::microseconds>(duration).count();
  if (microseconds <= 1) {
    return 0;
  }
  const auto index = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(microseconds - 1)));
  return std::min(index, bucket_count - 1);
}

KVFERRY_INLINE std::uint64_t LatencyHistogram::count() const noexcept {
  return std::accumulate(counts.begin(), counts.end(), std::uint64_t{0});
}

KVFERRY_INLINE std::chrono::nanoseconds LatencyHistogram::quantile(double fraction) const noexcept {
  const auto wanted =
      static_cast<std::uint64_t>(std::ceil(std::clamp(fraction, 0.0, 1.0) * static_cast<double>(count())));
  std::uint64_t seen = 0;
  for (std::size_t i = 0; i < bucket_count; ++i) {
    seen += counts[i];
    if (seen != 0 && seen >= wanted) {
      return upper_bound(i);
    }
  }
  return {};
}

KVFERRY_INLINE std::uint64_t TransferStats::failed() const noexcept {
  return std::accumulate(failures.begin(), failures.end(), std::uint64_t{0},
                         [](std::uint64_t sum, const Failures& failure) { return sum + failure.operations; });
}

}  // namespace kvferry
