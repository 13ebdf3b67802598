// SPDX-License-Identifier: Apache-2.0
// An RDMA channel's statistics.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <algorithm>
#include <fstream>
#include <stdexcept>
#include <string>

#include "noted_verbs.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// The bytes of this process that adapters may reach: the kernel keeps them in memory.
std::size_t pinned_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmPin:")) {
      return static_cast<std::size_t>(std::stoull(line.substr(6))) * 1024;
    }
  }
  throw std::runtime_error("the kernel doesn't tell what is pinned");
}

TEST(RdmaStats, EveryKindOfTransferIsCountedAndEveryRailsBytes) {
  constexpr std::size_t count = 32;
  NodeOptions options;
  options.channel.keepalive_interval = std::chrono::milliseconds(0);
  Node node(count, options);
  Node peer(count);
  node.fill(3);
  node.connect("node", "peer", peer);
  node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = indexes(count)});
  node.channel->batched_read(node.pages(5), {.peer_id = "peer", .remote_indexes = indexes(5)});
  std::vector<std::size_t> sizes(3);
  auto receiving = peer.channel->async_batched_recv({peer.region.first(8 * page_size), peer.page(9), peer.page(10, 5)},
                                                    {.peer_id = "node", .sizes = sizes}, asio::use_future);
  std::error_code ec;
  node.channel->batched_send({node.region.first(8 * page_size - 1), node.page(9, 100), node.page(10, 6)},
                             {.peer_id = "peer"}, ec);
  EXPECT_EQ(ec, errc::buffer_too_small);
  EXPECT_THROW(receiving.get(), std::system_error);

  const ChannelStats own = node.channel->stats();
  EXPECT_EQ(own.transport, "rdma");
  EXPECT_EQ(own.connected_peers, 1U);
  EXPECT_EQ(own.of(TransferKind::write).succeeded, 1U);
  EXPECT_EQ(own.of(TransferKind::write).bytes, count * page_size);
  EXPECT_EQ(own.of(TransferKind::read).objects, 5U);
  EXPECT_EQ(own.of(TransferKind::read).bytes, 5 * page_size);
  EXPECT_EQ(own.of(TransferKind::send).failed(), 1U);
  EXPECT_EQ(own.of(TransferKind::send).objects, 2U);
  ASSERT_EQ(own.paths.size(), 1U);
  EXPECT_EQ(own.paths[0].name, "rail 0 " + node.channel->rails()[0].device + ":1");
  EXPECT_GT(own.paths[0].bytes_out, (count + 8) * page_size);
  EXPECT_EQ(own.paths[0].bytes_in, 5 * page_size);

  const ChannelStats theirs = peer.channel->stats();
  const TransferStats& recvs = theirs.of(TransferKind::recv);
  EXPECT_EQ(recvs.failed(), 1U);
  EXPECT_EQ(recvs.objects, 2U);
  EXPECT_EQ(recvs.bytes, 8 * page_size - 1 + 100);
}

TEST(RdmaStats, ARailTellsWhatWasUnderWayWhenAListCompletedAndMoreWasToCome) {
  constexpr std::size_t count = 512;
  constexpr std::size_t depth = 64;
  NodeOptions options;
  options.channel.queue_depth = depth;
  Node node(count, options);
  Node peer(count);
  node.connect("node", "peer", peer);
  const auto window = [&] { return node.channel->rails()[0].window; };
  node.channel->batched_write(node.pages(1), {.peer_id = "peer", .remote_indexes = indexes(1)});
  EXPECT_EQ(window().lists, 0U) << "nothing was to follow it";
  EXPECT_EQ(window().left, 0);
  auto reversed = indexes(count);
  std::ranges::reverse(reversed);  // so that each page takes a request
  node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = reversed});
  EXPECT_GE(window().lists, (count - depth) / (depth / 4))
      << "those that made room for the requests beyond the queue's depth";
  EXPECT_LE(window().drained, window().lists);
  EXPECT_LT(window().left, 1);
  EXPECT_EQ(peer.channel->rails()[0].window.lists, 0U);
}

TEST(RdmaStats, APeerTakes64KiBOfPinnedMemoryAndMoreOnlyOnceItUsesThem) {
  constexpr std::size_t count = 8;
  constexpr std::size_t at_first = std::size_t{64} << 10;
  constexpr std::size_t at_most = (messages + most_slots) * message_bytes;
  Node hub(1);
  std::vector<std::unique_ptr<Node>> peers;
  std::vector<std::string> ids;
  for (std::size_t i = 0; i < count; ++i) {
    peers.push_back(std::make_unique<Node>(1));
    ids.push_back("peer" + std::to_string(i));
  }
  const std::size_t before = pinned_bytes();
  for (std::size_t i = 0; i < count; ++i) {
    hub.connect("hub", ids[i], *peers[i]);
  }
  const std::size_t ends = 2 * count;  // both are of this process
  EXPECT_EQ(pinned_bytes() - before, ends * at_first);
  const std::vector<std::byte> small(8);
  for (std::size_t i = 0; i < count; ++i) {
    for (int round = 0; round < 20; ++round) {
      hub.channel->batched_write(hub.pages(1),
                                 {.peer_id = ids[i], .remote_indexes = indexes(1), .notification = small});
      EXPECT_EQ(peers[i]->channel->receive_notification(long_enough).payload, small);
    }
  }
  EXPECT_EQ(pinned_bytes() - before, ends * at_first) << "one write at a time needs no more";
  // Of many messages each, none of which but the last is answered. They are so large that adapters read them from the memory, by
  // its key.
  const auto notify_all = [&](std::byte value) {
    const std::vector<std::byte> payload(max_notification_bytes, value);
    std::vector<std::future<void>> notified;
    for (int i = 0; i < 50; ++i) {
      notified.push_back(hub.channel->async_notify(ids[0], payload, {}, asio::use_future));
    }
    for (auto& one : notified) {
      one.get();
      EXPECT_TRUE(peers[0]->channel->receive_notification(long_enough).payload == payload);
    }
  };
  registrations_refused = 0;
  registering_fails = true;
  notify_all(std::byte{1});
  registering_fails = false;
  EXPECT_GT(registrations_refused, 0) << "else nothing was to grow";
  EXPECT_LE(registrations_refused, 2) << "one of each end, which stays as it is from then on";
  notify_all(std::byte{2});
  EXPECT_EQ(pinned_bytes() - before, ends * at_first);
  hub.channel->disconnect(ids[0]);
  hub.connect("hub", ids[0], *peers[0]);
  EXPECT_TRUE(eventually([&] { return pinned_bytes() - before == ends * at_first; }))
      << "the peer's old end ends later";
  notify_all(std::byte{3});
  EXPECT_GT(pinned_bytes() - before, ends * at_first);
  EXPECT_LE(pinned_bytes() - before, (ends - 2) * at_first + 2 * at_most) << "of one peer's connection";
}

}  // namespace
}  // namespace kvferry::rdma::testing
