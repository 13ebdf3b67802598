// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "work_planner.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Registered memory out of which messages are sent, in slots of equal size.
struct MessageSlots {
  std::byte* memory = nullptr;
  std::size_t count = 0;
  std::size_t bytes = 0;  ///< Of a slot: what the peer's receive buffers hold.
  std::uint32_t key = 0;
};

/// The agreed limits of a rail's two sides.
struct RailTerms {
  std::size_t peer_buffers = 0;  ///< Receive buffers of the peer, at most: messages that may be under way to it.
  std::size_t peer_buffers_at_first = 0;
  std::size_t own_buffers = 0;  ///< At most.
  std::size_t own_buffers_at_first = 0;
  std::size_t most_slots = 0;   ///< Places to send messages from, with those that come later.
  std::size_t queue_depth = 0;  ///< Work requests posted at a time.
  std::size_t max_inline = 0;
  RequestLimits request;
  std::size_t eager_bytes = 0;
  std::size_t checks = 0;  ///< Messages with checksums that the peer takes at a time; 0: it has no checksums.
};

}  // namespace kvferry::rdma
