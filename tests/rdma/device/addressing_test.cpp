// SPDX-License-Identifier: Apache-2.0
// The devices, GIDs and memory that a channel is given, and those that it picks: line 21 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <unistd.h>

#include <asio/ip/address.hpp>

#include <cstddef>
#include <fstream>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// The GID that a channel with these options tells its peers, and the device it is of.
std::pair<std::string, Bytes> told_gid(RdmaOptions options) {
  Bytes gid;
  NodeOptions node_options;
  node_options.channel = options;
  node_options.rails = 0;
  node_options.told = [&](Endpoint& endpoint) { gid = endpoint.rails[0].gid; };
  Node node(1, std::move(node_options));
  NodeOptions asking;
  asking.channel = std::move(options);
  asking.rails = 0;
  Node other(1, std::move(asking));
  other.connect("other", "node", node);
  return {node.channel->rails()[0].device, gid};
}

/// The address of a rail's GID that is one of IPv4, or of IPv6 and not of the link alone; as the kernel tells it.
std::optional<asio::ip::address> rail_address(const RdmaRail& rail, bool is_v6) {
  for (int index = 0; index < 16; ++index) {
    std::ifstream file("/sys/class/infiniband/" + rail.device + "/ports/" + std::to_string(rail.port) + "/gids/" +
                       std::to_string(index));
    std::string text;
    std::error_code ec;
    if (!(file >> text)) {
      continue;
    }
    const auto gid = asio::ip::make_address_v6(text, ec);
    if (ec || gid.is_unspecified() || gid.is_link_local() || gid.is_v4_mapped() == is_v6) {
      continue;
    }
    return is_v6 ? asio::ip::address(gid) : asio::ip::make_address_v4(asio::ip::v4_mapped, gid);
  }
  return {};
}

class RdmaAddresses : public ::testing::TestWithParam<std::tuple<std::size_t, bool>> {};

TEST_P(RdmaAddresses, Line21_TheGidIsPickedByTheAddress) {
  const auto [number, is_v6] = GetParam();
  const RdmaRail rail = first_rails(number + 1)[number];
  const auto address = rail_address(rail, is_v6);
  if (!address.has_value()) {
    GTEST_SKIP() << rail.device << " has no GID that is an " << (is_v6 ? "IPv6" : "IPv4") << " address";
  }
  RdmaOptions options;
  options.peer_init_url = "tcp://" + (is_v6 ? "[" + address->to_string() + "]" : address->to_string()) + ":0";
  const auto [used, gid] = told_gid(options);
  EXPECT_EQ(used, rail.device);
  ASSERT_EQ(gid.size(), 16U);
  const bool mapped = gid[10] == std::byte{0xff} && gid[11] == std::byte{0xff} && gid[0] == std::byte{0};
  EXPECT_EQ(mapped, !is_v6);
}

INSTANTIATE_TEST_SUITE_P(Rails, RdmaAddresses, ::testing::Combine(::testing::Values(0U, 1U), ::testing::Bool()),
                         [](const auto& rail) {
                           return "Rail" + std::to_string(std::get<0>(rail.param)) +
                                  (std::get<1>(rail.param) ? "IPv6" : "IPv4");
                         });

TEST(RdmaFaults, Line21_TheGidIsTheOneOfTheIndexAskedFor) {
  const RdmaRail rail = first_rails(1)[0];
  std::vector<Bytes> gids;
  for (const std::uint32_t index : {0U, 1U}) {
    RdmaOptions options;
    options.rails = {{rail.device, rail.port, index}};
    gids.push_back(told_gid(options).second);
  }
  EXPECT_NE(gids[0], gids[1]);
}

TEST(RdmaFaults, APartitionIsAskedForByItsKey) {
  RdmaRail rail = first_rails(1)[0];
  rail.partition_key = 0x7fff;  // the one that is there by default
  RdmaOptions options;
  options.rails = {rail};
  (void)told_gid(options);
  rail.partition_key = 0x0123;
  options.rails = {rail};
  try {
    const RdmaTransferChannel channel(options);
    ADD_FAILURE() << "in no partition";
  } catch (const TransferError& error) {
    EXPECT_NE(std::string(error.what()).find("no partition of key 0x0123, there are: 0xffff"), std::string::npos)
        << error.what();
  }
}

TEST(RdmaFaults, AQueueThatIsDeeperThanTheDeviceAllows) {
  NodeOptions options;
  options.channel.queue_depth = std::size_t{1} << 30;
  Node node(64, std::move(options));
  Node peer(64);
  node.fill(3);
  node.connect("node", "peer", peer);
  EXPECT_EQ(node.channel->batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = indexes(64)}), 64U);
  EXPECT_TRUE(same(node, peer));
}

TEST(RdmaFaults, ADmaBufThatIsNoneIsRefusedByName) {
  const int file = ::memfd_create("no dma-buf", MFD_CLOEXEC);
  ASSERT_GE(file, 0);
  std::vector<std::byte> memory(page_size);
  RdmaOptions options;
  options.rails = first_rails(1);
  MemoryRegion region{memory.data(), memory.size(), page_size};
  region.dmabuf_fd = file;
  options.regions = {region};
  try {
    const RdmaTransferChannel channel(options);
    ADD_FAILURE() << "registered";
  } catch (const TransferError& error) {
    EXPECT_NE(std::string(error.what()).find("region 0"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("(a dma-buf)"), std::string::npos) << error.what();
  }
  ::close(file);
}

TEST(RdmaFaults, Line21_BothSidesMayUseIPv6) {
  const RdmaRail rail = first_rails(1)[0];
  const auto address = rail_address(rail, true);
  if (!address.has_value()) {
    GTEST_SKIP() << rail.device << " has no GID that is an IPv6 address";
  }
  const auto v6_node = [&] {
    NodeOptions options;
    options.rails = 0;
    options.channel.peer_init_url = "tcp://[" + address->to_string() + "]:0";
    return options;
  };
  Node a(8, v6_node());
  Node b(8, v6_node());
  a.fill(5);
  a.connect("a", "b", b);
  EXPECT_EQ(a.channel->batched_write(a.pages(8), {.peer_id = "b", .remote_indexes = indexes(8)}), 8U);
  EXPECT_TRUE(same(a, b));
}

TEST(RdmaFaults, Line21_AnUnknownDeviceOrGidIsNamed) {
  const auto sentence = [](RdmaRail rail) -> std::string {
    NodeOptions options;
    options.channel.rails = {std::move(rail)};
    try {
      Node node(1, options);
      Node other(1);
      other.connect("other", "node", node);
    } catch (const TransferError& error) {
      return error.what();
    }
    return {};
  };
  EXPECT_NE(sentence({"no_such_device"}).find("no_such_device"), std::string::npos);
  EXPECT_NE(sentence({first_rails(1)[0].device, 9}).find("no port 9"), std::string::npos);
  EXPECT_NE(sentence({first_rails(1)[0].device, 1, 999}).find("no GID of index 999"), std::string::npos);
}

}  // namespace
}  // namespace kvferry::rdma::testing
