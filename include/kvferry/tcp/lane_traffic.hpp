// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Counts the bytes of all lanes of one number, of all of a channel's peers. On a cache line of its own:
/// lanes of different numbers are driven by different threads.
struct alignas(64) LaneTraffic {
  std::atomic<std::uint64_t> sent{0};
  std::atomic<std::uint64_t> received{0};
};

/// By lane number.
using TrafficOfLanes = std::array<LaneTraffic, max_lanes>;

}  // namespace kvferry::tcp
