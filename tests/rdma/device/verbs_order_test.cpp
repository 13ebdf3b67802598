// SPDX-License-Identifier: Apache-2.0
// In which order verbs are called when something fails or ends.
#include <gtest/gtest.h>

#include <infiniband/verbs.h>

#include <asio/bind_executor.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "noted_verbs.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

bool is_destroyed(const ibv_qp* pair) {
  const std::lock_guard lock(verbs_log().mutex);
  return std::ranges::any_of(verbs_log().calls, [&](const VerbsLog::Call& call) {
    return call.verb == VerbsLog::Verb::destroy_queue_pair && call.what == pair;
  });
}

TEST(VerbsOrder, Line19_APartlyFailedPostDestroysTheQueuePairAndEndsTheOperationThen) {
  Node node(64);
  Node peer(64);
  node.fill(1);
  node.connect("node", "peer", peer);
  // Scattered, so that there are several requests.
  std::vector<std::uint64_t> reversed = indexes(64);
  std::ranges::reverse(reversed);
  verbs_log().clear();
  next_long_post_fails = true;
  bool destroyed_at_end = false;
  std::promise<std::error_code> ended;
  node.channel->async_batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = reversed},
                                    asio::bind_executor(asio::system_executor(), [&](std::error_code ec, std::size_t) {
                                      destroyed_at_end = is_destroyed(pair_of_failed_post);
                                      ended.set_value(ec);
                                    }));
  auto result = ended.get_future();
  ASSERT_EQ(result.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(result.get(), condition::may_still_land) << "a part of it had been posted";
  EXPECT_FALSE(next_long_post_fails);
  EXPECT_TRUE(destroyed_at_end);
  // Nothing that was posted still reads these buffers: the next write makes a new connection, and is whole.
  node.fill(2);
  EXPECT_EQ(node.channel->batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = indexes(64)}), 64U);
  EXPECT_TRUE(same(node, peer));
}

TEST(VerbsOrder, Line20_WhatWasRegisteredForAFailedOperationIsDeregisteredBeforeItEnds) {
  constexpr std::size_t count = 256;
  Node node(1);
  Node peer(count);
  node.connect("node", "peer", peer);
  std::vector<std::byte> outside(count * page_size);
  std::vector<MutableBuffer> objects;
  for (std::size_t i = 0; i < count; ++i) {
    objects.push_back(MutableBuffer(outside).subspan(i * page_size, page_size));
  }
  std::vector<std::uint64_t> reversed = indexes(count);
  std::ranges::reverse(reversed);
  const auto deregistered = [&] {
    const std::lock_guard lock(verbs_log().mutex);
    return std::ranges::count_if(verbs_log().calls, [&](const VerbsLog::Call& call) {
      return call.verb == VerbsLog::Verb::deregister && call.what >= outside.data() &&
             call.what < outside.data() + outside.size();
    });
  };
  verbs_log().clear();
  next_long_post_fails = true;
  std::ptrdiff_t deregistered_at_end = 0;
  std::promise<std::error_code> ended;
  node.channel->async_batched_write(objects, {.peer_id = "peer", .remote_indexes = reversed},
                                    asio::bind_executor(asio::system_executor(), [&](std::error_code ec, std::size_t) {
                                      deregistered_at_end = deregistered();
                                      ended.set_value(ec);
                                    }));
  auto result = ended.get_future();
  ASSERT_EQ(result.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(result.get(), condition::may_still_land) << "a part of it had been posted";
  EXPECT_GE(deregistered_at_end, 1);
  node.channel->close();
  EXPECT_EQ(deregistered(), deregistered_at_end);
}

TEST(VerbsOrder, Line20_RegionsAreDeregisteredAfterTheLastQueuePair) {
  Node hub(64);
  std::vector<std::unique_ptr<Node>> peers;
  for (int i = 0; i < 3; ++i) {
    peers.push_back(std::make_unique<Node>(64));
    hub.connect("hub", "peer" + std::to_string(i), *peers.back());
  }
  std::vector<std::future<std::size_t>> writes;
  for (int i = 0; i < 30; ++i) {
    writes.push_back(hub.channel->async_batched_write(
        hub.pages(64), {.peer_id = "peer" + std::to_string(i % 3), .remote_indexes = indexes(64)}, asio::use_future));
  }
  verbs_log().clear();
  hub.channel->close();
  for (auto& write : writes) {
    EXPECT_EQ(write.wait_for(long_enough), std::future_status::ready);
  }
  const std::lock_guard lock(verbs_log().mutex);
  const auto& calls = verbs_log().calls;
  const auto region = std::ranges::find_if(calls, [&](const VerbsLog::Call& call) {
    return call.verb == VerbsLog::Verb::deregister && call.what == hub.region.data();
  });
  ASSERT_NE(region, calls.end());
  const auto is_pair_of_hub = [&](const VerbsLog::Call& call) {
    return call.verb == VerbsLog::Verb::destroy_queue_pair && call.context == region->context;
  };
  EXPECT_EQ(std::count_if(calls.begin(), region, is_pair_of_hub), 3);
  EXPECT_EQ(std::count_if(region, calls.end(), is_pair_of_hub), 0);
}

TEST(VerbsOrder, APeerThatStopsWithinAListOrANotificationIsGivenUpAfterThePartsTimeout) {
  for (const auto type : {MessageType::notify, MessageType::recv_post}) {
    SCOPED_TRACE(type == MessageType::notify ? "notification" : "recv");
    std::string why;
    NodeOptions options;
    options.channel.parts_timeout = std::chrono::milliseconds(100);
    Node node(1, std::move(options));
    Node peer(1000);
    peer.connect("peer", "node", node);
    auto waiting = node.channel->async_batched_recv(node.pages(1), {.peer_id = "peer", .tag = 7, .diagnostic = &why},
                                                    asio::use_future);
    last_parts_withheld = type;
    std::future<std::size_t> stopped;
    if (type == MessageType::notify) {
      const std::vector<std::byte> notification(max_notification_bytes);
      stopped = peer.channel->async_batched_write(std::vector<MutableBuffer>(),
                                                  {.peer_id = "node", .notification = notification}, asio::use_future);
    } else {
      stopped = peer.channel->async_batched_recv(peer.pages(1000), {.peer_id = "node", .tag = 8}, asio::use_future);
    }
    const auto status = waiting.wait_for(long_enough);
    last_parts_withheld = MessageType{};
    ASSERT_EQ(status, std::future_status::ready);
    try {
      (void)waiting.get();
      ADD_FAILURE() << "nothing was sent";
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::connection_lost);
    }
    EXPECT_NE(why.find("the peer stopped within a recv's list of buffers, or a notification, for 100 ms"), std::string::npos)
        << why;
  }
}

TEST(VerbsOrder, Line04_AnAddressAtWhichNobodyAnswersDelaysNoOtherPeer) {
  const ChangeEndpoint make_absent = [](Endpoint& endpoint) {
    endpoint.rails[0].gid.back() = std::byte{AbsentPeer::last_byte};
  };
  Node hub(1);
  NodeOptions asks;
  asks.asked = make_absent;
  Node asking(1, std::move(asks));
  NodeOptions answers;
  answers.told = make_absent;
  Node answering(1, std::move(answers));
  const auto connect = [](const Node& from, const std::string& own_id, const std::string& peer_id, const Node& to) {
    return std::async(std::launch::async, [&from, own_id, peer_id, url = to.channel->peer_init_url()] {
      std::error_code ec;
      from.channel->lazy_init_peer_connection(own_id, peer_id, url, {}, {.timeout = long_enough}, ec);
      return ec;
    });
  };
  // The hub resolves one peer's address when it is asked, another's when it asks.
  auto accepted = connect(asking, "asking", "hub", hub);
  auto dialed = connect(hub, "hub", "answering", answering);
  ASSERT_TRUE(absent_peer().wait_until_resolving(2));
  Node other(1);
  other.connect("other", "hub", hub);
  Node another(1);
  hub.connect("hub", "another", another);
  absent_peer().give_up();
  EXPECT_TRUE(accepted.get());
  EXPECT_EQ(dialed.get(), std::errc::timed_out);
}

TEST(VerbsOrder, ScatteredObjectsOutsideOfRegionsAreCopiedRatherThanRegisteredOneByOne) {
  constexpr std::size_t count = 256;
  Node node(1);
  Node peer(count);
  node.connect("node", "peer", peer);
  std::vector<std::byte> outside(4 * count * page_size);
  std::vector<MutableBuffer> scattered;
  for (std::size_t i = 0; i < count; ++i) {
    scattered.push_back(MutableBuffer(outside).subspan(4 * i * page_size, page_size));
    std::ranges::fill(scattered.back(), static_cast<std::byte>(i));
  }
  const auto registered = [&] {
    const std::lock_guard lock(verbs_log().mutex);
    return std::ranges::count_if(verbs_log().calls, [&](const VerbsLog::Call& call) {
      return call.verb == VerbsLog::Verb::do_register && call.what >= outside.data() &&
             call.what < outside.data() + outside.size();
    });
  };
  const auto all = indexes(count);
  verbs_log().clear();
  EXPECT_EQ(node.channel->batched_write(scattered, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 0);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
    std::ranges::fill(scattered[i], std::byte{0});
  }
  EXPECT_EQ(node.channel->batched_read(scattered, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 0);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
  }
  // Buffers that lie end to end are one large range.
  std::vector<MutableBuffer> adjacent;
  for (std::size_t i = 0; i < count; ++i) {
    adjacent.push_back(MutableBuffer(outside).subspan(i * page_size, page_size));
  }
  EXPECT_EQ(node.channel->batched_write(adjacent, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 1);
}

TEST(VerbsOrder, MoreScatteredObjectsThanThereAreBlocksToCopyThrough) {
  constexpr std::size_t count = 1024;
  for (const bool isolates : {false, true}) {
    SCOPED_TRACE(isolates);
    Node node(1, isolates ? isolating() : NodeOptions());
    Node peer(count);
    peer.fill(3);
    node.connect("node", "peer", peer);
    std::vector<std::byte> outside(2 * count * page_size);
    std::vector<MutableBuffer> scattered;
    for (std::size_t i = 0; i < count; ++i) {
      scattered.push_back(MutableBuffer(outside).subspan(2 * i * page_size, page_size));
    }
    EXPECT_EQ(node.channel->batched_read(scattered, {.peer_id = "peer", .remote_indexes = indexes(count)}), count);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
    }
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
