// SPDX-License-Identifier: Apache-2.0
// Sizes of queue pairs on devices that the virtual machines don't have, by what their drivers in Linux say of them.
#include "rdma/device_limits.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint32_t receives = 64;
constexpr std::uint32_t header_bytes = 48;

struct Device {
  const char* name;
  int max_qp_wr;
  int max_sge;
  int max_sge_rd;
  int max_cqe;
  /// Whether the driver makes such a queue pair.
  std::function<bool(const QueuePairSize&)> takes;
};

std::uint32_t round_up(std::uint32_t value, std::uint32_t unit) { return (value + unit - 1) / unit * unit; }

/// drivers/infiniband/hw/mlx5/qp.c, `calc_sq_size`: a request has 32 bytes besides its gather list of 16 bytes a piece or its
/// inline bytes and 4 more, in units of 64; the queue, rounded up to a power of two, has as many units as max_qp_wr.
bool mlx5_takes(const QueuePairSize& size) {
  const std::uint32_t inlined = size.inline_bytes == 0 ? 0 : 32 + 4 + size.inline_bytes;
  const std::uint32_t request = round_up(std::max(32 + 16 * size.pieces, inlined), 64);
  return request <= 1024 && std::bit_ceil(size.requests * request) / 64 <= 32768;
}

/// drivers/infiniband/hw/irdma: user.h and defs.h. 13 pieces, 101 inline bytes, and of 32,768 places of 32 bytes, rounded up
/// to a power of two, 258 are the adapter's own; a request takes up to 8 of them.
bool irdma_takes(const QueuePairSize& size) {
  const std::uint32_t places = size.pieces > 6 || size.inline_bytes > 48 ? 8 : size.pieces > 3 ? 4 : 2;
  return size.pieces <= 13 && size.inline_bytes <= 101 && std::bit_ceil(size.requests * places + 258) <= 32768;
}

/// drivers/infiniband/hw/bnxt_re: requests of a fixed 128 bytes with 6 pieces or 96 inline bytes (qplib_fp.h).
bool bnxt_takes(const QueuePairSize& size) { return size.pieces <= 6 && size.inline_bytes <= 96; }

/// drivers/infiniband/sw/rxe/rxe_param.h
bool rxe_takes(const QueuePairSize& size) { return size.pieces <= 32 && size.inline_bytes <= 512; }

/// A first-generation driver that refuses inline bytes altogether.
bool without_inline_takes(const QueuePairSize& size) { return size.inline_bytes == 0; }

std::vector<Device> devices() {
  return {
      {"mlx5", 32768, 30, 30, 4194303, mlx5_takes},          {"irdma", 4063, 13, 13, 1048575, irdma_takes},
      {"bnxt_re", 16351, 6, 6, 65535, bnxt_takes},           {"rxe", 1 << 20, 32, 32, 32767, rxe_takes},
      {"no inline", 1024, 8, 1, 2047, without_inline_takes},
  };
}

ibv_device_attr limits_of(const Device& device) {
  ibv_device_attr limits{};
  limits.max_qp_wr = device.max_qp_wr;
  limits.max_sge = device.max_sge;
  limits.max_sge_rd = device.max_sge_rd;
  limits.max_cqe = device.max_cqe;
  return limits;
}

QueuePairSize first_taken(const Device& device, std::uint32_t requests) {
  const auto sizes = sizes_to_try(limits_of(device), {requests, 16, 128}, receives);
  const auto taken = std::ranges::find_if(sizes, device.takes);
  return taken == sizes.end() ? QueuePairSize{} : *taken;
}

TEST(DeviceLimits, EveryDeviceTakesEveryDepth) {
  for (const Device& device : devices()) {
    for (const std::uint32_t requests : {16U, 24U, 264U, 1000U, 16392U}) {
      SCOPED_TRACE(std::string(device.name) + " " + std::to_string(requests));
      const QueuePairSize size = first_taken(device, requests);
      EXPECT_GE(size.requests, 16U);
      EXPECT_LE(size.requests, requests);
      EXPECT_LE(size.requests, static_cast<std::uint32_t>(device.max_qp_wr));
      EXPECT_LE(size.requests + receives, static_cast<std::uint32_t>(device.max_cqe));
      EXPECT_GE(size.pieces, std::min<std::uint32_t>(16, static_cast<std::uint32_t>(device.max_sge)))
          << "fewer pieces than the device has";
    }
  }
}

TEST(DeviceLimits, TheUsualDepthIsTakenWhole) {
  for (const Device& device : devices()) {
    EXPECT_EQ(first_taken(device, 264).requests, 264U) << device.name;
  }
}

TEST(DeviceLimits, DepthTimesPiecesIsWhatHasToFit) {
  const QueuePairSize size = first_taken(devices()[0], 16392);
  EXPECT_EQ(size.requests, 4098U) << "of 320 bytes each, in a queue of 2 MiB";
  EXPECT_EQ(size.pieces, 16U);
  EXPECT_EQ(size.inline_bytes, 128U);
}

TEST(DeviceLimits, InlineFallsBackToWhatThereIs) {
  EXPECT_EQ(first_taken(devices()[0], 264).inline_bytes, 128U);
  EXPECT_EQ(first_taken(devices()[1], 264).inline_bytes, 96U);
  EXPECT_EQ(first_taken(devices()[2], 264).inline_bytes, 96U);
  EXPECT_GE(first_taken(devices()[1], 264).inline_bytes, header_bytes);
  EXPECT_EQ(first_taken(devices()[4], 264).inline_bytes, 0U);
}

TEST(DeviceLimits, ADeviceThatTakesNothingIsGivenUpInTheEnd) {
  const auto sizes = sizes_to_try(limits_of(devices()[0]), {16392, 16, 128}, receives);
  EXPECT_LE(sizes.size(), 100U);
  EXPECT_EQ(sizes.back().requests, 16U);
  EXPECT_EQ(sizes.back().pieces, 1U);
  EXPECT_EQ(sizes.back().inline_bytes, 0U);
}

TEST(DeviceLimits, ReadsMayHaveFewerPieces) {
  EXPECT_EQ(common_pieces(limits_of(devices()[0]), 16), 16U);
  EXPECT_EQ(common_pieces(limits_of(devices()[4]), 8), 1U);
}

ibv_device device_of(ibv_node_type node, ibv_transport_type transport) {
  ibv_device device{};
  device.node_type = node;
  device.transport_type = transport;
  return device;
}

TEST(DeviceLimits, DevicesWithoutReliableConnectionsByAddressAreNamedAsSuch) {
  EXPECT_EQ(unusable_because(device_of(IBV_NODE_CA, IBV_TRANSPORT_IB)), "");
  EXPECT_NE(unusable_because(device_of(IBV_NODE_RNIC, IBV_TRANSPORT_IWARP)).find("iWARP"), std::string::npos);
  EXPECT_NE(unusable_because(device_of(IBV_NODE_UNSPECIFIED, IBV_TRANSPORT_UNSPECIFIED)).find("EFA"),
            std::string::npos);
  EXPECT_NE(unusable_because(device_of(IBV_NODE_USNIC_UDP, IBV_TRANSPORT_USNIC_UDP)), "");
  EXPECT_NE(unusable_because(device_of(IBV_NODE_UNKNOWN, IBV_TRANSPORT_UNKNOWN)), "");
  EXPECT_NE(unusable_because(device_of(IBV_NODE_SWITCH, IBV_TRANSPORT_IB)), "");
}

TEST(DeviceLimits, APartitionIsFoundByItsKey) {
  constexpr std::array<std::uint16_t, 5> table{0xffff, 0x0012, 0x8013, 0x8012, 0};
  EXPECT_EQ(find_partition(table, 0xffff), 0);
  EXPECT_EQ(find_partition(table, 0x7fff), 0);
  EXPECT_EQ(find_partition(table, 0x0012), 3) << "as a full member rather than a limited one";
  EXPECT_EQ(find_partition(table, 0x8012), 3);
  EXPECT_EQ(find_partition(table, 0x0013), 2);
  EXPECT_FALSE(find_partition(table, 0x0014).has_value());
  EXPECT_FALSE(find_partition(table, 0x8000).has_value()) << "an empty entry is no partition";
}

}  // namespace
}  // namespace kvferry::rdma
