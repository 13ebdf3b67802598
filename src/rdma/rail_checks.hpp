// SPDX-License-Identifier: Apache-2.0
#pragma once

// Shared by both sides of checksums: rail_protocol_checks.cpp, rail_protocol_compare.cpp.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// About so many bytes at a time, so that others have their turn.
inline constexpr std::uint64_t step_bytes = max_part_bytes;
/// The cost of a piece of memory besides its bytes, as so many of them: each may lie on a page of its own.
inline constexpr std::uint64_t bytes_of_a_piece = 256;
/// `Checks::came` of an object of which nothing came, because it doesn't fit.
inline constexpr std::uint64_t nothing_came = std::numeric_limits<std::uint64_t>::max();

[[nodiscard]] inline std::string differs(std::size_t object) {
  return "object " + std::to_string(object) + " landed with other bytes than were sent: its checksum differs";
}

}  // namespace kvferry::rdma
