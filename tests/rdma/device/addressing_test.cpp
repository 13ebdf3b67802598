// SPDX-License-Identifier: Apache-2.0
// Which devices, GIDs and memory a channel is given and picks: line 21 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "rdma/rdma_node.hpp"

namespace kvferry::rdma::testing {
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

TEST(RdmaFaults, Line21_TheGidIsPickedByTheAddress) {
  const auto rails = first_rails(2);
  for (const auto& [variable, device] :
       {std::pair{"KVFERRY_RAIL0", rails[0].device}, std::pair{"KVFERRY_RAIL1", rails[1].device},
        std::pair{"KVFERRY_RAIL0_V6", rails[0].device}, std::pair{"KVFERRY_RAIL1_V6", rails[1].device}}) {
    SCOPED_TRACE(variable);
    const char* const address = std::getenv(variable);
    if (address == nullptr) {
      GTEST_SKIP() << "the addresses of this machine's rails are not known";
    }
    const bool is_v6 = std::string(variable).ends_with("_V6");
    RdmaOptions options;
    options.peer_init_url = is_v6 ? "tcp://[" + std::string(address) + "]:0" : "tcp://" + std::string(address) + ":0";
    const auto [used, gid] = told_gid(options);
    EXPECT_EQ(used, device);
    ASSERT_EQ(gid.size(), 16U);
    const bool mapped = gid[10] == std::byte{0xff} && gid[11] == std::byte{0xff} && gid[0] == std::byte{0};
    EXPECT_EQ(mapped, !is_v6);
  }
}

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
  const char* const address = std::getenv("KVFERRY_RAIL0_V6");
  if (address == nullptr) {
    GTEST_SKIP() << "the addresses of this machine's rails are not known";
  }
  const auto v6_node = [&] {
    NodeOptions options;
    options.rails = 0;
    options.channel.peer_init_url = "tcp://[" + std::string(address) + "]:0";
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
