// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/transfer_counters.hpp>

#include <new>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void TransferCounters::count_start(TransferKind kind) noexcept {
  kinds_[static_cast<std::size_t>(kind)].started.fetch_add(1, std::memory_order_relaxed);
}

KVFERRY_INLINE TransferCounters::TransferCounters() {
  for (OfKind& kind : kinds_) {
    kind.failures.emplace(std::make_error_code(std::errc::not_enough_memory), 0);
  }
}

KVFERRY_INLINE void TransferCounters::count_end(TransferKind kind, const Outcome& outcome) noexcept {
  OfKind& counters = kinds_[static_cast<std::size_t>(kind)];
  counters.objects.fetch_add(outcome.objects, std::memory_order_relaxed);
  counters.bytes.fetch_add(outcome.bytes, std::memory_order_relaxed);
  if (outcome.cause) {
    const std::lock_guard lock(mutex_);
    try {
      ++counters.failures[outcome.cause];
    } catch (const std::bad_alloc&) {
      ++counters.failures.find(std::make_error_code(std::errc::not_enough_memory))->second;
    }
    return;
  }
  counters.nanoseconds.fetch_add(static_cast<std::uint64_t>(outcome.took.count()), std::memory_order_relaxed);
  // Releases its start: see snapshot_of.
  counters.latency[LatencyHistogram::bucket_of(outcome.took)].fetch_add(1, std::memory_order_release);
}

KVFERRY_INLINE std::array<TransferStats, 4> TransferCounters::snapshot() const {
  return {snapshot_of(kinds_[0]), snapshot_of(kinds_[1]), snapshot_of(kinds_[2]), snapshot_of(kinds_[3])};
}

KVFERRY_INLINE TransferStats TransferCounters::snapshot_of(const OfKind& kind) const {
  TransferStats stats;
  // Ends before starts, so that no operation has ended that has not started.
  for (std::size_t i = 0; i < kind.latency.size(); ++i) {
    stats.latency.counts[i] = kind.latency[i].load(std::memory_order_acquire);
  }
  stats.succeeded = stats.latency.count();
  stats.latency.sum = std::chrono::nanoseconds(kind.nanoseconds.load(std::memory_order_relaxed));
  {
    const std::lock_guard lock(mutex_);
    stats.failures.reserve(kind.failures.size());
    for (const auto& [cause, operations] : kind.failures) {
      if (operations != 0) {
        stats.failures.push_back({cause, operations});
      }
    }
  }
  stats.objects = kind.objects.load(std::memory_order_relaxed);
  stats.bytes = kind.bytes.load(std::memory_order_relaxed);
  stats.started = kind.started.load(std::memory_order_relaxed);
  return stats;
}

}  // namespace kvferry::kit
