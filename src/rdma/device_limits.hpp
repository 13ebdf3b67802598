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

/// Sizes to request from a device, one after the other until it accepts one, best first. A device's attributes limit
/// each value alone, but their product has to fit (a request's slot holds its gather list and inline bytes), and no
/// attribute limits the inline bytes. So all are first limited by the attributes. Then the inline bytes shrink, then
/// the requests, and last the gather list, since it decides how many requests a batch takes.
/// @param wanted at least 16 requests and one piece.
/// @param receives receive requests, whose completions go to the same queue.
[[nodiscard]] std::vector<QueuePairSize> sizes_to_try(const ibv_device_attr& limits, const QueuePairSize& wanted,
                                                      std::uint32_t receives);

/// Pieces of a request that may also be an RDMA read's.
[[nodiscard]] std::uint32_t common_pieces(const ibv_device_attr& limits, std::uint32_t of_queue_pair) noexcept;

/// The reason why this library can't use a device, whatever its ports; empty if it can. It needs reliable connections
/// that are made by exchanging addresses, as with InfiniBand and RoCE.
[[nodiscard]] std::string unusable_because(const ibv_device& device);

/// Finds the entry for the partition `wanted` in a port's table of partition keys. The bit for full membership isn't
/// compared; an entry with full membership is preferred.
[[nodiscard]] std::optional<std::uint16_t> find_partition(std::span<const std::uint16_t> table,
                                                          std::uint16_t wanted) noexcept;

}  // namespace kvferry::rdma
