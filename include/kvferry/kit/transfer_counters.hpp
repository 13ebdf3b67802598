// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_TRANSFER_COUNTERS_HPP
#define KVFERRY_KIT_TRANSFER_COUNTERS_HPP

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <system_error>

#include <kvferry/channel_stats.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Counts the outcomes of a channel's operations. Thread-safe.
///
/// An operation takes one addition when it starts and five when it ends, without locks. Only a failure, which is rare,
/// takes a lock.
class TransferCounters {
 public:
  TransferCounters();

  /// The outcome of an operation.
  struct Outcome {
    std::error_code cause;
    std::size_t objects = 0;
    std::uint64_t bytes = 0;
    std::chrono::nanoseconds took{0};
  };

  void count_start(TransferKind kind) noexcept;
  /// A cause that is new when memory is used up counts as `std::errc::not_enough_memory`.
  void count_end(TransferKind kind, const Outcome& outcome) noexcept;
  void count_checksum_mismatches(std::size_t objects) noexcept {
    checksum_mismatches_.fetch_add(objects, std::memory_order_relaxed);
  }

  /// By `TransferKind`.
  [[nodiscard]] std::array<TransferStats, 4> snapshot() const;
  [[nodiscard]] std::uint64_t checksum_mismatches() const noexcept {
    return checksum_mismatches_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr std::size_t cache_line = 64;

  struct OfKind {
    // Counted by callers; the rest by whoever ends operations.
    alignas(cache_line) std::atomic<std::uint64_t> started{0};
    alignas(cache_line) std::atomic<std::uint64_t> objects{0};
    std::atomic<std::uint64_t> bytes{0};
    std::atomic<std::uint64_t> nanoseconds{0};
    std::array<std::atomic<std::uint64_t>, LatencyHistogram::bucket_count> latency{};
    std::map<std::error_code, std::uint64_t> failures;  ///< Guarded by `mutex_`; one has not happened, perhaps.
  };

  [[nodiscard]] TransferStats snapshot_of(const OfKind& kind) const;

  std::array<OfKind, 4> kinds_;
  std::atomic<std::uint64_t> checksum_mismatches_{0};
  mutable std::mutex mutex_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_TRANSFER_COUNTERS_HPP
