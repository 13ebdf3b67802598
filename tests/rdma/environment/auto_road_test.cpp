// SPDX-License-Identifier: Apache-2.0
// The channel of several transports, whose RDMA road goes down and comes back.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <cstddef>
#include <future>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/rdma_transfer_channel.hpp>

#include "auto/auto_node.hpp"
#include "rdma/environment/network_device.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

using roads::testing::all_pages;
using roads::testing::begins;
using roads::testing::has;

AutoOptions rdma_then_tcp() {
  RdmaOptions rdma;
  rdma.rails = first_rails(1);
  rdma.ack_timeout = std::chrono::milliseconds(60);
  AutoOptions options;
  options.roads = {road<RdmaTransferChannel>("rdma", std::move(rdma)), roads::testing::tcp()};
  options.road_timeout = std::chrono::seconds(5);  // on a port that comes up nobody may answer yet
  options.handshake_timeout = long_enough;
  options.default_timeout = long_enough;
  return options;
}

TEST(RdmaAutoRoad, WhenThePortGoesDownTheNextOperationTakesTheOtherRoad) {
  if (!may_change_links()) {
    GTEST_SKIP() << "not in a virtual machine: the link is somebody's";
  }
  roads::testing::Node b(rdma_then_tcp());
  roads::testing::Node a(rdma_then_tcp());
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "rdma ")) << a.path_to("b");
  EXPECT_TRUE(begins(b.path_to("a"), "rdma ")) << b.path_to("a");
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  std::vector<std::byte> added(roads::testing::page);
  const std::uint32_t number = b.channel->add_region({added.data(), added.size(), added.size()});
  const auto write_to_added = [&](std::uint64_t seed) {
    kvferry::testing::fill(a.at(0), seed);
    const std::vector<ConstBuffer> objects{a.at(0)};
    const std::vector<std::uint64_t> index{0};
    std::error_code ec;
    (void)a.channel->batched_write(objects, {.peer_id = "b", .remote_indexes = index, .remote_region = number}, ec);
    return ec;
  };
  EXPECT_FALSE(write_to_added(2));

  std::vector<MutableBuffer> targets{b.at(0)};
  auto pending = b.channel->async_batched_recv(targets, {.peer_id = "a", .tag = 7}, asio::use_future);
  const NetworkDevice device(first_rails(1)[0]);
  device.set_down();
  std::error_code cause;
  try {
    (void)pending.get();
  } catch (const std::system_error& error) {
    cause = error.code();
  }
  EXPECT_EQ(cause, condition::retryable) << cause.message();
  EXPECT_FALSE(a.write(3));
  EXPECT_TRUE(b.holds(3));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_TRUE(has(a.path_to("b"), "; not rdma: ")) << a.path_to("b");
  EXPECT_TRUE(a.warned("path_chosen: road tcp; not rdma: "));
  EXPECT_FALSE(write_to_added(4));
  EXPECT_TRUE(kvferry::testing::matches({added.data(), added.size()}, 4));
  b.channel->remove_region(number, long_enough);
  EXPECT_EQ(write_to_added(5), errc::region_gone);

  // Back, but not taken before somebody has it chosen anew.
  device.set_up();
  EXPECT_TRUE(eventually([] { return !RdmaTransferChannel::active_rails().empty(); }));
  EXPECT_FALSE(a.write(6));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_TRUE(eventually([&] {
    a.channel->disconnect("b");
    EXPECT_FALSE(a.connect(b));
    return begins(a.path_to("b"), "rdma ");
  })) << a.path_to("b");
  EXPECT_FALSE(a.write(7));
  EXPECT_TRUE(b.holds(7));
  EXPECT_EQ(write_to_added(8), errc::region_gone);
}

}  // namespace
}  // namespace kvferry::rdma::testing
