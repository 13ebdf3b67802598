// SPDX-License-Identifier: Apache-2.0
#include "device_limits.hpp"

#include <algorithm>
#include <array>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint32_t least_requests = 16;
/// Below the last but one not even a message's header fits, and the device is asked for nothing and may say what it has.
constexpr std::array<std::uint32_t, 5> inline_steps{128, 96, 64, 48, 0};
constexpr std::uint16_t full_member = 0x8000;

std::uint32_t bounded(std::uint32_t wanted, int of_device, std::uint32_t least) {
  return std::min(wanted, std::max(static_cast<std::uint32_t>(std::max(of_device, 0)), least));
}

}  // namespace

std::vector<QueuePairSize> sizes_to_try(const ibv_device_attr& limits, const QueuePairSize& wanted,
                                        std::uint32_t receives) {
  const auto of_completions = static_cast<std::int64_t>(limits.max_cqe) - receives;
  std::uint32_t requests = bounded(wanted.requests, limits.max_qp_wr, least_requests);
  requests = bounded(requests, static_cast<int>(std::max<std::int64_t>(of_completions, 0)), least_requests);
  std::uint32_t pieces = bounded(wanted.pieces, limits.max_sge, 1);
  std::vector<QueuePairSize> sizes;
  const auto add_all = [&] {
    sizes.push_back({requests, pieces, wanted.inline_bytes});
    for (const std::uint32_t step : inline_steps) {
      if (step < wanted.inline_bytes) {
        sizes.push_back({requests, pieces, step});
      }
    }
  };
  add_all();
  while (requests > least_requests) {
    requests = std::max(requests / 2, least_requests);
    add_all();
  }
  while (pieces > 1) {
    pieces /= 2;
    add_all();
  }
  return sizes;
}

std::uint32_t common_pieces(const ibv_device_attr& limits, std::uint32_t of_queue_pair) noexcept {
  return bounded(of_queue_pair, limits.max_sge_rd, 1);
}

std::string unusable_because(const ibv_device& device) {
  if (device.transport_type == IBV_TRANSPORT_IWARP || device.node_type == IBV_NODE_RNIC) {
    return "it is an iWARP adapter, whose connections are made by TCP";
  }
  if (device.transport_type == IBV_TRANSPORT_UNSPECIFIED || device.node_type == IBV_NODE_UNSPECIFIED) {
    return "it has a transport of its own without reliable connections, as AWS's EFA";
  }
  if (device.transport_type != IBV_TRANSPORT_IB || device.node_type != IBV_NODE_CA) {
    return "it is no InfiniBand or RoCE adapter";
  }
  return {};
}

std::optional<std::uint16_t> find_partition(std::span<const std::uint16_t> table, std::uint16_t wanted) noexcept {
  std::optional<std::uint16_t> found;
  for (std::size_t i = 0; i < table.size(); ++i) {
    if ((table[i] & ~full_member) == (wanted & ~full_member) && (wanted & ~full_member) != 0) {
      if ((table[i] & full_member) != 0) {
        return static_cast<std::uint16_t>(i);
      }
      if (!found) {
        found = static_cast<std::uint16_t>(i);
      }
    }
  }
  return found;
}

}  // namespace kvferry::rdma
