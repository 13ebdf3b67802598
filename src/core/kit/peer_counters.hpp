// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

namespace kvferry::kit {

/// What became of the operations with one peer. Shared by the peer and its operations; outlives both.
struct PeerCounters {
  std::atomic<std::uint64_t> succeeded{0};
  std::atomic<std::uint64_t> failed{0};
  std::atomic<std::uint64_t> bytes{0};
  std::atomic<std::uint64_t> connects{0};
};

}  // namespace kvferry::kit
