// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PEER_COUNTERS_HPP
#define KVFERRY_KIT_PEER_COUNTERS_HPP

#include <atomic>
#include <cstdint>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Counts how the operations with one peer ended. Shared by the peer and its operations; outlives both.
struct PeerCounters {
  std::atomic<std::uint64_t> succeeded{0};
  std::atomic<std::uint64_t> failed{0};
  std::atomic<std::uint64_t> bytes{0};
  std::atomic<std::uint64_t> connects{0};
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PEER_COUNTERS_HPP
