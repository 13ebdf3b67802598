// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <system_error>
#include <vector>

#include <kvferry/channel_stats.hpp>

namespace kvferry::kit {

/// What became of the operations with one peer. Shared by the peer and its operations; outlives both.
struct PeerCounters {
  std::atomic<std::uint64_t> succeeded{0};
  std::atomic<std::uint64_t> failed{0};
  std::atomic<std::uint64_t> bytes{0};
  std::atomic<std::uint64_t> connects{0};
};

/// Counts by error. Thread-safe; for what happens seldom.
class CauseCounter {
 public:
  void count(const std::error_code& cause) {
    const std::lock_guard lock(mutex_);
    ++counts_[cause];
  }

  [[nodiscard]] std::vector<CauseCount> snapshot() const {
    const std::lock_guard lock(mutex_);
    std::vector<CauseCount> counts;
    counts.reserve(counts_.size());
    for (const auto& [cause, count] : counts_) {
      counts.push_back({cause, count});
    }
    return counts;
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::error_code, std::uint64_t> counts_;
};

}  // namespace kvferry::kit
