// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_REFUSALS_HPP
#define KVFERRY_KIT_REFUSALS_HPP

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/channel_stats.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/logger.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Counts by error. Thread-safe; for rare events.
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

/// Counts and logs the strangers that a channel refuses at its ports: `ChannelStats::refused_strangers`, and the event
/// "stranger_refused". Thread-safe.
class KVFERRY_EXPORT Refusals {
 public:
  explicit Refusals(std::shared_ptr<Logger> logger) : logger_(std::move(logger)) {}
  Refusals(const Refusals&) = delete;
  Refusals& operator=(const Refusals&) = delete;

  /// @param source the stranger's address, or IPv6 network; may be empty.
  /// @param why a sentence.
  void count(std::error_code cause, std::string_view source, std::string_view why);
  /// Ordered by cause.
  [[nodiscard]] std::vector<CauseCount> snapshot() const { return counts_.snapshot(); }

 private:
  const std::shared_ptr<Logger> logger_;
  CauseCounter counts_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_REFUSALS_HPP
