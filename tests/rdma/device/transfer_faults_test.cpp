// SPDX-License-Identifier: Apache-2.0
// Lines 19 to 24 of docs/fault_table.md, and peers that claim what isn't so.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <future>
#include <latch>
#include <thread>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

using std::chrono::milliseconds;

std::error_code write(const Node& from, const std::string& to, std::size_t count, std::size_t first = 0) {
  std::error_code ec;
  from.channel->batched_write(from.pages(count), {.peer_id = to, .remote_indexes = indexes(count, first)}, ec);
  return ec;
}

std::error_code read(const Node& to, const std::string& from, std::size_t count, std::size_t first = 0) {
  std::error_code ec;
  to.channel->batched_read(to.pages(count), {.peer_id = from, .remote_indexes = indexes(count, first)}, ec);
  return ec;
}

/// A peer's claim about its region, and the first slice that it leads to.
struct Claim {
  const char* what;
  ChangeEndpoint change;
};

std::vector<Claim> wrong_claims() {
  return {
      {"keys",
       [](Endpoint& endpoint) {
         for (std::uint32_t& key : endpoint.rails[0].regions[0].keys) {
           key ^= 0x5a00;
         }
       }},
      {"address before the region", [](Endpoint& endpoint) { endpoint.rails[0].regions[0].address -= 16 * page_size; }},
      {"address in the middle of the region",
       [](Endpoint& endpoint) { endpoint.rails[0].regions[0].address += 16 * page_size; }},
      {"address behind all memory", [](Endpoint& endpoint) { endpoint.rails[0].regions[0].address = 1ULL << 62; }},
      {"length: the first slice for all of the region",
       [](Endpoint& endpoint) {
         RegionKeys& region = endpoint.rails[0].regions[0];
         region.slice_bytes *= region.keys.size();
         region.keys.resize(1);
       }},
  };
}

NodeOptions sliced(ChangeEndpoint told = {}, ChangeEndpoint heard = {}) {
  NodeOptions options;
  options.channel.slice_bytes = 16 * page_size;
  options.told = std::move(told);
  options.heard = std::move(heard);
  return options;
}

TEST(RdmaFaults, Line19_APeerThatLiesAboutItsRegionFailsTheOperationAndNothingElse) {
  for (const Claim& claim : wrong_claims()) {
    SCOPED_TRACE(claim.what);
    Node liar(32, sliced(claim.change));
    Node other(32);
    Node node(32);
    node.fill(1);
    node.connect("node", "liar", liar);
    node.connect("node", "other", other);
    for (const bool writes : {true, false}) {
      SCOPED_TRACE(writes ? "write" : "read");
      const auto ec = writes ? write(node, "liar", 32) : read(node, "liar", 32);
      EXPECT_EQ(ec, wc_status::remote_access_error) << ec.message();
      // The adapter has nothing of it any more: the buffers are this test's.
      node.fill(2);
      const std::vector<std::byte> before(node.region.begin(), node.region.end());
      EXPECT_FALSE(write(node, "other", 32));
      EXPECT_TRUE(same(node, other));
      EXPECT_TRUE(std::ranges::equal(node.region, before));
    }
    EXPECT_TRUE(node.guards_intact());
    EXPECT_TRUE(liar.guards_intact());
  }
}

TEST(RdmaFaults, Line19_OperationsBesideTheOneThatBrokeTheConnectionMayBeTriedAgain) {
  constexpr std::size_t count = 2048;
  constexpr std::size_t half = count / 2;
  for (const std::size_t rails : {1U, 2U}) {
    SCOPED_TRACE(std::to_string(rails) + " rails");
    const auto on_rails = [&] {
      NodeOptions options;
      options.rails = rails;
      options.channel.slice_bytes = half * page_size;
      return options;
    };
    // Only what goes beyond the first half of the region is wrong.
    NodeOptions lies = on_rails();
    lies.told = [](Endpoint& endpoint) {
      for (RailEndpoint& rail : endpoint.rails) {
        rail.regions[0].keys[1] ^= 0x5a00;
      }
    };
    Node liar(count, std::move(lies));
    Node node(count, on_rails());
    node.fill(1);
    node.connect("node", "liar", liar);
    std::vector<std::future<std::size_t>> good;
    for (int i = 0; i < 8; ++i) {
      good.push_back(node.channel->async_batched_write(
          node.pages(half), {.peer_id = "liar", .remote_indexes = indexes(half)}, asio::use_future));
      good.push_back(node.channel->async_batched_read(
          node.pages(half, half), {.peer_id = "liar", .remote_indexes = indexes(half)}, asio::use_future));
    }
    EXPECT_EQ(write(node, "liar", 1, half), wc_status::remote_access_error);
    for (auto& transfer : good) {
      ASSERT_EQ(transfer.wait_for(long_enough), std::future_status::ready);
      try {
        EXPECT_EQ(transfer.get(), half);
      } catch (const std::system_error& error) {
        EXPECT_EQ(error.code(), condition::retryable) << error.what();
      }
    }
    EXPECT_FALSE(write(node, "liar", half)) << "the next call reconnects";
    EXPECT_TRUE(std::ranges::equal(node.region.first(half * page_size), liar.region.first(half * page_size)));
  }
}

TEST(RdmaFaults, Line19_WhatAPeerMayNotReachItsAdapterDoesntReach) {
  for (const Claim& claim : wrong_claims()) {
    SCOPED_TRACE(claim.what);
    Node node(32, sliced());
    node.fill(std::byte{0x11});
    Node friendly(32);
    friendly.connect("friendly", "node", node);
    NodeOptions options = sliced({}, claim.change);
    options.listens = false;
    Node attacker(32, std::move(options));
    attacker.fill(std::byte{0x66});
    attacker.connect("attacker", "node", node);
    EXPECT_EQ(write(attacker, "node", 16, 16), wc_status::remote_access_error);
    EXPECT_TRUE(node.guards_intact());
    EXPECT_FALSE(read(friendly, "node", 32)) << "others are served";
  }
}

TEST(RdmaFaults, Line19_ARegionIsClosedToWhatItsAccessDoesntAllow) {
  // The peer believes that it may: it has a key. The adapter knows better.
  for (const Access access : {Access::read, Access::write}) {
    NodeOptions options;
    options.access = access;
    Node node(4, std::move(options));
    node.fill(std::byte{0x11});
    Node peer(4);
    peer.connect("peer", "node", node);
    const auto ec = access == Access::read ? write(peer, "node", 4) : read(peer, "node", 4);
    EXPECT_EQ(ec, errc::access_denied) << "found by this side's check";
    EXPECT_TRUE(node.holds(std::byte{0x11}));
  }
}

TEST(RdmaFaults, ASenselessEndpointIsRefusedWithBothValues) {
  const std::vector<Claim> senseless{
      {"rails", [](Endpoint& endpoint) { endpoint.rails.clear(); }},
      {"gid", [](Endpoint& endpoint) { endpoint.rails[0].gid.resize(15); }},
      {"queue pair", [](Endpoint& endpoint) { endpoint.rails[0].queue_pair = 1 << 24; }},
      {"mtu", [](Endpoint& endpoint) { endpoint.rails[0].mtu = 1500; }},
      {"keys", [](Endpoint& endpoint) { endpoint.rails[0].regions[0].keys.resize(7); }},
      {"address", [](Endpoint& endpoint) { endpoint.rails[0].regions[0].address = ~std::uint64_t{0}; }},
      {"messages", [](Endpoint& endpoint) { endpoint.messages = 0; }},
      {"message size", [](Endpoint& endpoint) { endpoint.message_bytes = 1 << 30; }},
      {"link layer", [](Endpoint& endpoint) { endpoint.rails[0].link_layer = "InfiniBand"; }},
      {"gid type", [](Endpoint& endpoint) { endpoint.rails[0].gid_type = "RoCE v1"; }},
      {"rail", [](Endpoint& endpoint) { endpoint.rails[0].rail = 3; }},
  };
  for (const Claim& claim : senseless) {
    SCOPED_TRACE(claim.what);
    NodeOptions told;
    told.told = claim.change;
    Node liar(4, std::move(told));
    Node node(4);
    std::error_code ec;
    std::string diagnostic;
    node.channel->lazy_init_peer_connection("node", "liar", liar.channel->peer_init_url(), {},
                                            {.timeout = long_enough, .diagnostic = &diagnostic}, ec);
    EXPECT_TRUE(ec == errc::malformed_message || ec == errc::handshake_failed) << ec.message() << " " << diagnostic;
    EXPECT_NE(diagnostic.find("liar"), std::string::npos) << diagnostic;
    EXPECT_FALSE(node.channel->remote_xfer_handler_exists("liar"));
  }
}

TEST(RdmaFaults, Line20_MemoryIsQuietOnceAChannelIsClosed) {
  constexpr std::size_t count = 512;
  for (int round = 0; round < 5; ++round) {
    Node node(count);
    Node target(count);
    node.fill(std::byte{0x22});
    node.connect("node", "target", target);
    std::vector<std::future<std::size_t>> writes;
    for (int i = 0; i < 20; ++i) {
      writes.push_back(node.channel->async_batched_write(
          node.pages(count), {.peer_id = "target", .remote_indexes = indexes(count)}, asio::use_future));
    }
    ASSERT_TRUE(eventually([&] { return target.region.back() == std::byte{0x22}; }));
    target.channel->close();
    target.fill(std::byte{0x33});
    for (auto& write_of_all : writes) {
      ASSERT_EQ(write_of_all.wait_for(long_enough), std::future_status::ready);
      try {
        EXPECT_EQ(write_of_all.get(), count);
      } catch (const std::system_error& error) {
        EXPECT_EQ(error.code(), condition::retryable) << error.what();
      }
    }
    EXPECT_TRUE(target.holds(std::byte{0x33})) << "written after close";
    EXPECT_TRUE(node.holds(std::byte{0x22}));
  }
}

TEST(RdmaFaults, Line20_WhatWasHandedOverIsAcknowledgedThoughItsReceiverClosesAtOnce) {
  for (const std::size_t rails : {1U, 2U}) {
    for (int round = 0; round < 20; ++round) {
      SCOPED_TRACE(std::to_string(rails) + " rails, round " + std::to_string(round));
      const auto on_rails = [&] {
        NodeOptions options;
        options.rails = rails;
        return options;
      };
      Node node(8, on_rails());
      Node server(8, on_rails());
      node.connect("node", "server", server);
      std::vector<std::future<std::size_t>> writes;
      // One on each rail.
      for (std::size_t i = 0; i < rails; ++i) {
        writes.push_back(node.channel->async_batched_write(
            node.pages(8),
            {.peer_id = "server", .remote_indexes = indexes(8), .notification = std::as_bytes(std::span("end"))},
            asio::use_future));
      }
      for (std::size_t i = 0; i < rails; ++i) {
        (void)server.channel->receive_notification(long_enough);
      }
      server.channel->close();
      for (auto& write_of_all : writes) {
        ASSERT_EQ(write_of_all.wait_for(long_enough), std::future_status::ready);
        EXPECT_EQ(write_of_all.get(), 8U);
      }
    }
  }
}

TEST(RdmaFaults, Line20_NoCompletionIsLost) {
  // Operations that come one by one from several threads: each time the queue has just been found empty.
  constexpr std::size_t threads = 4;
  constexpr std::size_t rounds = 500;
  Node node(2 * threads);
  Node peer(2 * threads);
  node.connect("node", "peer", peer);
  std::latch ready(threads);
  std::vector<std::future<std::size_t>> done;
  for (std::size_t thread = 0; thread < threads; ++thread) {
    done.push_back(std::async(std::launch::async, [&, thread] {
      ready.arrive_and_wait();
      std::size_t moved = 0;
      const std::uint64_t index = thread;
      for (std::size_t i = 0; i < rounds; ++i) {
        const auto at = std::span(&index, 1);
        moved += node.channel->batched_write({node.page(thread)}, {.peer_id = "peer", .remote_indexes = at});
        moved += node.channel->batched_read({node.page(threads + thread)}, {.peer_id = "peer", .remote_indexes = at});
      }
      return moved;
    }));
  }
  for (auto& all : done) {
    EXPECT_EQ(all.get(), 2 * rounds);
  }
}

TEST(RdmaFaults, Line21_TheSmallerValuesCount) {
  // Each side hears from the other what a modest adapter would say, with its own able to do more. Queue pairs whose
  // MTUs differ don't get a full packet through.
  const ChangeEndpoint make_modest = [](Endpoint& endpoint) {
    endpoint.rails[0].mtu = 256;
    endpoint.rails[0].reads_taken = 1;
    endpoint.rails[0].reads_made = 1;
    endpoint.rails[0].max_message = 65536;
    endpoint.message_bytes = 1024;
  };
  Node modest(64);
  NodeOptions options;
  options.channel.read_depth = 64;
  options.asked = make_modest;
  options.heard = make_modest;
  Node node(64, std::move(options));
  modest.fill(3);
  node.connect("node", "modest", modest);
  EXPECT_FALSE(read(node, "modest", 64));
  EXPECT_TRUE(same(node, modest));
  node.fill(4);
  EXPECT_FALSE(write(node, "modest", 64));
  EXPECT_TRUE(same(node, modest));
  // Messages of 1 KiB.
  auto receiving =
      modest.channel->async_batched_recv(modest.pages(32, 32), {.peer_id = "node", .tag = 1}, asio::use_future);
  EXPECT_EQ(node.channel->batched_send(node.pages(32), {.peer_id = "modest", .tag = 1}), 32U);
  EXPECT_EQ(receiving.get(), 32U);
  EXPECT_TRUE(std::ranges::equal(node.region.first(32 * page_size), modest.region.last(32 * page_size)));
}

TEST(RdmaFaults, Line21_ObjectsOutsideOfRegionsFitAPeersSmallerMessages) {
  // The peer's messages are too small for these objects, which this side would otherwise send in one.
  Node modest(8);
  NodeOptions options;
  options.heard = [](Endpoint& endpoint) { endpoint.message_bytes = 1024; };
  Node node(8, std::move(options));
  node.connect("node", "modest", modest);
  std::vector<std::byte> outside(3000, std::byte{7});
  auto receiving = modest.channel->async_batched_recv({modest.region.first(2 * page_size), modest.page(4)},
                                                      {.peer_id = "node", .tag = 1}, asio::use_future);
  const std::span<std::byte> all(outside);
  EXPECT_EQ(node.channel->batched_send({all, all.first(969)}, {.peer_id = "modest", .tag = 1}), 2U);
  EXPECT_EQ(receiving.get(), 2U);
  EXPECT_TRUE(std::ranges::equal(modest.region.first(3000), outside));
  EXPECT_TRUE(std::ranges::equal(modest.page(4, 969), all.first(969)));
}

TEST(RdmaFaults, Line22_ALongBatchOfScatteredPagesFlowsThroughAShortQueue) {
  constexpr std::size_t count = 5000;
  NodeOptions options;
  options.channel.queue_depth = 16;
  Node node(count, std::move(options));
  Node peer(count);
  node.fill(6);
  node.connect("node", "peer", peer);
  auto scattered = indexes(count);
  std::shuffle(scattered.begin(), scattered.end(), std::mt19937(1));
  ASSERT_EQ(node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = scattered}), count);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(node.page(i), peer.page(scattered[i]))) << i;
  }
  peer.fill(7);
  ASSERT_EQ(node.channel->batched_read(node.pages(count), {.peer_id = "peer", .remote_indexes = scattered}), count);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(node.page(i), peer.page(scattered[i]))) << i;
  }
}

TEST(RdmaFaults, Line23_PagesOnTheBordersOfSlices) {
  constexpr std::size_t count = 64;
  // Objects of one and a half pages of the system's, in regions whose slices end within them.
  const auto options = [] {
    NodeOptions with_slices;
    with_slices.channel.slice_bytes = 2 * page_size;
    return with_slices;
  };
  constexpr std::size_t object = page_size * 3 / 2;
  std::vector<std::byte> a_memory(count * object);
  std::vector<std::byte> b_memory(count * object, std::byte{0});
  const auto channel = [&](std::vector<std::byte>& memory, bool listens) {
    auto with_region = options().channel;
    with_region.rails = first_rails(1);
    with_region.regions = {{memory.data(), memory.size(), object}};
    with_region.peer_init_url = listens ? "tcp://127.0.0.1:0" : "";
    return std::make_unique<RdmaTransferChannel>(with_region);
  };
  std::mt19937 random(2);
  std::ranges::generate(a_memory, [&] { return static_cast<std::byte>(random()); });
  const auto b = channel(b_memory, true);
  const auto a = channel(a_memory, false);
  a->lazy_init_peer_connection("a", "b", b->peer_init_url());
  std::vector<MutableBuffer> objects;
  for (std::size_t i = 0; i < count; ++i) {
    objects.push_back(std::span(a_memory).subspan(i * object, object));
  }
  EXPECT_EQ(a->batched_write(objects, {.peer_id = "b", .remote_indexes = indexes(count)}), count);
  EXPECT_EQ(a_memory, b_memory);
  std::ranges::fill(a_memory, std::byte{0});
  EXPECT_EQ(a->batched_read(objects, {.peer_id = "b", .remote_indexes = indexes(count)}), count);
  EXPECT_EQ(a_memory, b_memory);
}

TEST(RdmaFaults, Line24_StripedAboveAThresholdOnlyAndEachRailsBytesAreCounted) {
  constexpr std::size_t count = 512;
  const auto options = [] {
    NodeOptions two;
    two.rails = 2;
    two.channel.stripe_threshold = 64 * page_size;
    two.channel.keepalive_interval = milliseconds(0);
    return two;
  };
  Node node(count, options());
  Node peer(count, options());
  node.fill(8);
  node.connect("node", "peer", peer);
  const auto written = [&](std::size_t rail) { return node.channel->rails().at(rail).bytes_written; };
  const auto bytes_read = [&](std::size_t rail) { return node.channel->rails().at(rail).bytes_read; };
  const std::uint64_t start[2]{written(0), written(1)};

  EXPECT_FALSE(write(node, "peer", 63));
  const std::uint64_t small[2]{written(0) - start[0], written(1) - start[1]};
  EXPECT_EQ(small[0] + small[1], 63 * page_size);
  EXPECT_TRUE(small[0] == 0 || small[1] == 0) << small[0] << " " << small[1];

  EXPECT_FALSE(write(node, "peer", count));
  const std::uint64_t large[2]{written(0) - start[0] - small[0], written(1) - start[1] - small[1]};
  EXPECT_EQ(large[0] + large[1], count * page_size);
  EXPECT_EQ(large[0], large[1]);
  EXPECT_TRUE(same(node, peer));

  EXPECT_FALSE(read(node, "peer", count));
  EXPECT_EQ(bytes_read(0), count / 2 * page_size);
  EXPECT_EQ(bytes_read(1), count / 2 * page_size);
}

TEST(RdmaFaults, RecvIntoARegionThatPeersMayWriteTo) {
  // Large objects are written straight into the buffers; the bytes counted are the objects' and little more.
  constexpr std::size_t count = 256;
  Node node(count);
  Node peer(count);
  node.fill(9);
  node.connect("node", "peer", peer);
  const auto before = node.channel->rails()[0].bytes_written;
  std::vector<std::size_t> sizes(2);
  const MutableBuffer large = peer.region.first(128 * page_size);
  const MutableBuffer small = peer.page(200);
  auto receiving =
      peer.channel->async_batched_recv({large, small}, {.peer_id = "node", .tag = 4, .sizes = sizes}, asio::use_future);
  EXPECT_EQ(node.channel->batched_send({node.region.first(128 * page_size - 5), node.page(200, 100)},
                                       {.peer_id = "peer", .tag = 4}),
            2U);
  EXPECT_EQ(receiving.get(), 2U);
  EXPECT_EQ(sizes, (std::vector<std::size_t>{128 * page_size - 5, 100}));
  EXPECT_TRUE(std::ranges::equal(node.region.first(128 * page_size - 5), large.first(128 * page_size - 5)));
  EXPECT_TRUE(std::ranges::equal(node.page(200, 100), small.first(100)));
  EXPECT_LT(node.channel->rails()[0].bytes_written - before, 130 * page_size);
}

TEST(RdmaFaults, ObjectsOutsideOfEveryRegion) {
  constexpr std::size_t count = 64;
  Node node(count);
  Node peer(count);
  peer.fill(10);
  node.connect("node", "peer", peer);
  // Each allocated on its own; together once few enough to be copied, once too many.
  for (const std::size_t objects : {std::size_t{3}, count}) {
    SCOPED_TRACE(objects);
    std::vector<std::vector<std::byte>> memory(objects, std::vector<std::byte>(page_size));
    std::vector<MutableBuffer> buffers(memory.begin(), memory.end());
    ASSERT_EQ(node.channel->batched_read(buffers, {.peer_id = "peer", .remote_indexes = indexes(objects)}), objects);
    for (std::size_t i = 0; i < objects; ++i) {
      ASSERT_TRUE(std::ranges::equal(memory[i], peer.page(i)));
      std::ranges::fill(memory[i], static_cast<std::byte>(i));
    }
    ASSERT_EQ(node.channel->batched_write(buffers, {.peer_id = "peer", .remote_indexes = indexes(objects)}), objects);
    for (std::size_t i = 0; i < objects; ++i) {
      ASSERT_TRUE(std::ranges::equal(memory[i], peer.page(i)));
    }
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
