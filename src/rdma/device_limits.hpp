// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// The sizes of a queue pair's send side.
struct QueuePairSize {
  std::uint32_t requests = 0;      ///< Posted at a time.
  std::uint32_t pieces = 0;        ///< In a request's gather list.
  std::uint32_t inline_bytes = 0;  ///< Of a message that is copied into its request.
};

/// Sizes to ask a device for, one after the other until it takes one, best first. A device's attributes bound each
/// value alone, while it is their product that has to fit (a request's place holds its gather list and inline bytes),
/// and nothing says how many inline bytes there are. So first they are bounded, then the inline bytes go down, then
/// the requests, and the gather list last, since that decides how many requests a batch takes.
/// @param wanted at least 16 requests and one piece.
/// @param receives receive requests, whose completions go to the same queue.
[[nodiscard]] std::vector<QueuePairSize> sizes_to_try(const ibv_device_attr& limits, const QueuePairSize& wanted,
                                                      std::uint32_t receives);

/// Pieces of a request that may also be an RDMA read's.
[[nodiscard]] std::uint32_t common_pieces(const ibv_device_attr& limits, std::uint32_t of_queue_pair) noexcept;

/// Why this library can't use a device, whatever its ports are like; empty if it can. It takes reliable connections
/// that are made by exchanging addresses, as InfiniBand and RoCE have.
[[nodiscard]] std::string unusable_because(const ibv_device& device);

/// The entry of a port's table of partition keys that is for the partition `wanted`; the bit that says whether this
/// port is a full member isn't compared, and full membership is preferred.
[[nodiscard]] std::optional<std::uint16_t> find_partition(std::span<const std::uint16_t> table,
                                                          std::uint16_t wanted) noexcept;

}  // namespace kvferry::rdma
