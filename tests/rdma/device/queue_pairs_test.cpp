// SPDX-License-Identifier: Apache-2.0
// Connections of several queue pairs on a rail.
#include <gtest/gtest.h>

#include <infiniband/verbs.h>

#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/device/noted_verbs.hpp"
#include "rdma/device/watched_verbs.hpp"
#include "rdma/endpoint.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// Notes the bytes of each queue pair's writes and reads, and can have one break.
class BytesOfPairs final : public watched_verbs::Watcher {
 public:
  int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) override {
    std::uint64_t bytes = 0;
    for (const ibv_send_wr* request = list; request != nullptr; request = request->next) {
      if (request->opcode == IBV_WR_RDMA_WRITE || request->opcode == IBV_WR_RDMA_READ) {
        for (int i = 0; i < request->num_sge; ++i) {
          bytes += request->sg_list[i].length;
        }
      }
    }
    bool breaks = false;
    if (bytes != 0) {
      const std::lock_guard lock(mutex_);
      bytes_[pair->qp_num] += bytes;
      breaks = bytes_.size() == breaks_as_number_;
      breaks_as_number_ = breaks ? 0 : breaks_as_number_;
    }
    if (breaks) {  // before: an emulated adapter may be done with the requests when they are posted
      ibv_qp_attr broken{};
      broken.qp_state = IBV_QPS_ERR;
      EXPECT_EQ(ibv_modify_qp(pair, &broken, IBV_QP_STATE), 0);
    }
    return Watcher::post_send(pair, list, bad);
  }

  /// Since the last call, in pages.
  [[nodiscard]] std::map<std::uint32_t, std::uint64_t> take() {
    const std::lock_guard lock(mutex_);
    auto taken = std::exchange(bytes_, {});
    for (auto& [pair, bytes] : taken) {
      EXPECT_EQ(bytes % page_size, 0U);
      bytes /= page_size;
    }
    return taken;
  }
  /// The queue pair that is the n-th to be used from now on.
  void break_number(std::size_t number) {
    const std::lock_guard lock(mutex_);
    bytes_.clear();
    breaks_as_number_ = number;
  }

 private:
  std::mutex mutex_;
  std::map<std::uint32_t, std::uint64_t> bytes_;
  std::size_t breaks_as_number_ = 0;
};

NodeOptions with_pairs(std::size_t pairs, std::size_t rails = 1) {
  NodeOptions options{.rails = rails};
  options.channel.queue_pairs_per_rail = pairs;
  options.channel.queue_pair_threshold = 64 * page_size;
  options.channel.stripe_threshold = 8 * page_size;
  options.channel.keepalive_interval = std::chrono::milliseconds(0);
  return options;
}

std::size_t pairs_of(const Node& node, const std::string& peer) {
  const std::string path = node.channel->peer_info(peer)->path;
  constexpr std::string_view each = " queue pair ";
  std::size_t count = 0;
  for (auto at = path.find(each); at != std::string::npos; at = path.find(each, at + 1)) {
    ++count;
  }
  return count;
}

std::error_code move_pages(const Node& node, std::size_t count, bool writes) {
  std::error_code ec;
  const auto all = indexes(count);
  const TransferSpec spec{.peer_id = "peer", .remote_indexes = all};
  if (writes) {
    node.channel->batched_write(node.pages(count), spec, ec);
  } else {
    node.channel->batched_read(node.pages(count), spec, ec);
  }
  return ec;
}

TEST(RdmaQueuePairs, LargeBatchesAreSpreadOverThemAndAllElseGoesOverTheFirst) {
  constexpr std::size_t count = 256;
  watched_verbs::Watching<BytesOfPairs> bytes;
  Node node(count, with_pairs(4));
  Node peer(count, with_pairs(4));
  node.connect("node", "peer", peer);
  EXPECT_EQ(pairs_of(node, "peer"), 4U);
  EXPECT_EQ(node.channel->rails().size(), 1U);
  (void)bytes->take();
  std::uint32_t first = 0;
  for (const bool writes : {true, false, true}) {
    SCOPED_TRACE(writes);
    node.fill(1);
    peer.fill(2);
    ASSERT_FALSE(move_pages(node, 63, writes));
    const auto small = bytes->take();
    ASSERT_EQ(small.size(), 1U);
    EXPECT_EQ(small.begin()->second, 63U);
    EXPECT_TRUE(first == 0 || first == small.begin()->first);
    first = small.begin()->first;

    ASSERT_FALSE(move_pages(node, count, writes));
    const auto large = bytes->take();
    EXPECT_EQ(large.size(), 4U);
    EXPECT_TRUE(large.contains(first));
    for (const auto& [pair, pages] : large) {
      EXPECT_EQ(pages, count / 4) << pair;
    }
    EXPECT_TRUE(same(node, peer));
  }
  // A paired operation's tag selects a rail.
  for (const std::uint64_t tag : {0U, 1U, 2U, 3U}) {
    node.fill(static_cast<unsigned>(tag));
    auto receiving = peer.channel->async_batched_recv({peer.region}, {.peer_id = "node", .tag = tag}, asio::use_future);
    EXPECT_EQ(node.channel->batched_send({node.region}, {.peer_id = "peer", .tag = tag}), 1U);
    EXPECT_EQ(receiving.get(), 1U);
    EXPECT_TRUE(same(node, peer));
  }
  const auto paired = bytes->take();
  ASSERT_EQ(paired.size(), 1U);
  EXPECT_EQ(paired.begin()->first, first);
}

TEST(RdmaQueuePairs, ARailsPartOfABatchIsSpreadOverThem) {
  constexpr std::size_t count = 256;
  watched_verbs::Watching<BytesOfPairs> bytes;
  Node node(count, with_pairs(2, 2));
  Node peer(count, with_pairs(2, 2));
  node.connect("node", "peer", peer);
  EXPECT_EQ(pairs_of(node, "peer"), 4U);
  struct Case {
    std::size_t pages;
    std::vector<std::uint64_t> of_pairs;
  };
  (void)bytes->take();
  for (const auto& [pages, of_pairs] :
       {Case{7, {7}}, Case{8, {4, 4}}, Case{64, {32, 32}}, Case{128, {32, 32, 32, 32}}}) {
    SCOPED_TRACE(pages);
    node.fill(static_cast<unsigned>(pages));
    ASSERT_FALSE(move_pages(node, pages, true));
    std::vector<std::uint64_t> found;
    for (const auto& [pair, moved] : bytes->take()) {
      found.push_back(moved);
    }
    EXPECT_EQ(found, of_pairs);
    EXPECT_TRUE(same(node.region.first(pages * page_size), peer.region.first(pages * page_size)));
  }

  // Below the threshold for several rails, above the one for several queue pairs.
  NodeOptions other = with_pairs(2, 2);
  other.channel.stripe_threshold = count * page_size;
  Node third(count, std::move(other));
  third.connect("third", "peer", peer);
  (void)bytes->take();
  std::size_t of_rail[2]{};
  for (int i = 0; i < 2; ++i) {
    const auto before = third.channel->rails();
    ASSERT_FALSE(move_pages(third, 128, true));
    const auto moved = bytes->take();
    EXPECT_EQ(moved.size(), 2U);
    for (const auto& [pair, pages] : moved) {
      EXPECT_EQ(pages, 64U);
    }
    const auto after = third.channel->rails();
    for (std::size_t rail = 0; rail < 2; ++rail) {
      of_rail[rail] += after[rail].bytes_written - before[rail].bytes_written == 128 * page_size ? 1U : 0U;
    }
  }
  EXPECT_EQ(of_rail[0], 1U) << "rails take turns";
  EXPECT_EQ(of_rail[1], 1U);
}

TEST(RdmaQueuePairs, TheSmallerNumberCountsAndTheOthersAreLetGo) {
  struct Case {
    std::size_t own;
    std::size_t peers;
    std::size_t used;
  };
  for (const auto& [own, peers, used] :
       {Case{4, 2, 2}, Case{2, 3, 2}, Case{1, 3, 1}, Case{3, 1, 1}, Case{100, 100, max_queue_pairs}, Case{0, 2, 1}}) {
    for (const bool asks : {true, false}) {
      SCOPED_TRACE(std::to_string(own) + " with " + std::to_string(peers) + (asks ? ", asks" : ", is asked"));
      // One that has a single queue pair says no more than one of an older version.
      const ChangeEndpoint note = [one = peers == 1](Endpoint& endpoint) {
        EXPECT_EQ(!endpoint.rails.at(0).further, one);
      };
      NodeOptions of_peer = with_pairs(peers);
      of_peer.asked = note;
      if (peers == 1) {
        of_peer.told = note;
      }
      Node node(256, with_pairs(own));
      Node peer(256, std::move(of_peer));
      verbs_log().clear();
      if (asks) {
        node.connect("node", "peer", peer);
      } else {
        peer.connect("peer", "node", node);
        ASSERT_TRUE(eventually([&] { return node.channel->peer_info("peer").has_value(); }));
      }
      EXPECT_EQ(pairs_of(node, "peer"), used);
      const std::size_t of_dialing = std::clamp<std::size_t>(asks ? own : peers, 1, max_queue_pairs);
      {
        const std::lock_guard lock(verbs_log().mutex);
        EXPECT_EQ(static_cast<std::size_t>(
                      std::ranges::count(verbs_log().calls, VerbsLog::Verb::destroy_queue_pair, &VerbsLog::Call::verb)),
                  of_dialing - used);
      }
      node.fill(3);
      EXPECT_FALSE(move_pages(node, 256, true));
      EXPECT_TRUE(same(node, peer));
      peer.fill(4);
      EXPECT_FALSE(move_pages(node, 256, false));
      EXPECT_TRUE(same(node, peer));
    }
  }
}

TEST(RdmaQueuePairs, WithoutRoomForAllEachRailHasAsManyAsThereIsRoomFor) {
  struct Case {
    int room;
    std::size_t used;
  };
  for (const auto& [room, used] : {Case{2, 2}, Case{3, 2}, Case{4, 4}, Case{5, 4}, Case{6, 6}}) {
    SCOPED_TRACE(room);
    NodeOptions dialing = with_pairs(3, 2);
    dialing.asked = [](Endpoint& /*endpoint*/) { room_for_queue_pairs = -1; };  // it has made its own
    Node node(256, std::move(dialing));
    Node peer(256, with_pairs(3, 2));
    room_for_queue_pairs = room;
    node.connect("node", "peer", peer);
    EXPECT_EQ(pairs_of(node, "peer"), used);
    node.fill(static_cast<unsigned>(room));
    EXPECT_FALSE(move_pages(node, 256, true));
    EXPECT_TRUE(same(node, peer));
  }
}

TEST(RdmaQueuePairs, OneThatBreaksEndsTheConnectionAndTheNextCallMakesANewOne) {
  constexpr std::size_t count = 256;
  for (const bool writes : {true, false}) {
    for (const std::size_t broken : {1U, 2U, 3U}) {
      SCOPED_TRACE(std::to_string(broken) + (writes ? ", write" : ", read"));
      watched_verbs::Watching<BytesOfPairs> bytes;
      Node node(count, with_pairs(3));
      Node peer(count, with_pairs(3));
      node.connect("node", "peer", peer);
      bytes->break_number(broken);
      const std::error_code error = move_pages(node, count, writes);
      EXPECT_EQ(error, condition::peer_failed) << error.message();
      EXPECT_EQ(error, condition::retryable) << error.message();
      node.fill(5);
      peer.fill(6);
      EXPECT_FALSE(move_pages(node, count, writes));
      EXPECT_TRUE(same(node, peer));
      EXPECT_EQ(pairs_of(node, "peer"), 3U);
    }
  }
}

TEST(RdmaQueuePairs, ANotificationComesBehindTheBytesOfAllOfThem) {
  constexpr std::size_t count = 256;
  Node node(count, with_pairs(4));
  Node peer(count, with_pairs(4));
  node.connect("node", "peer", peer);
  const auto all = indexes(count);
  for (unsigned round = 1; round <= 20; ++round) {
    const auto value = static_cast<std::byte>(round);
    node.fill(value);
    const std::vector<std::byte> notification(8, value);
    auto writing = node.channel->async_batched_write(
        node.pages(count), {.peer_id = "peer", .remote_indexes = all, .notification = notification}, asio::use_future);
    EXPECT_EQ(peer.channel->receive_notification(long_enough).payload, notification);
    EXPECT_TRUE(peer.holds(value));
    EXPECT_EQ(writing.get(), count);
  }
}

TEST(RdmaQueuePairs, OfIsolatedPeersTheyShareOneDomainThatEndsWithTheLast) {
  constexpr std::size_t count = 256;
  for (const bool isolated : {true, false}) {
    SCOPED_TRACE(isolated);
    NodeOptions options = with_pairs(3);
    options.channel.isolate_peers = isolated;
    Node hub(count, std::move(options));
    Node peer(count, with_pairs(3));
    const auto calls = [&](VerbsLog::Verb verb) {
      const std::lock_guard lock(verbs_log().mutex);
      return std::ranges::count_if(verbs_log().calls, [&](const VerbsLog::Call& call) {
        return call.verb == verb && call.what == hub.region.data();
      });
    };
    verbs_log().clear();
    hub.connect("hub", "peer", peer);
    EXPECT_EQ(calls(VerbsLog::Verb::do_register), isolated ? 1 : 0);
    hub.fill(7);
    EXPECT_FALSE(move_pages(hub, count, true));
    EXPECT_TRUE(same(hub, peer));
    peer.fill(8);
    std::error_code ec;
    peer.channel->batched_write(peer.pages(count), {.peer_id = "hub", .remote_indexes = indexes(count)}, ec);
    EXPECT_FALSE(ec) << ec.message();
    EXPECT_TRUE(same(hub, peer));
    verbs_log().clear();
    hub.channel->disconnect("peer");
    EXPECT_EQ(calls(VerbsLog::Verb::deregister), isolated ? 1 : 0);
    if (isolated) {
      const std::lock_guard lock(verbs_log().mutex);
      const auto& log = verbs_log().calls;
      const auto region = std::ranges::find_if(log, [&](const VerbsLog::Call& call) {
        return call.verb == VerbsLog::Verb::deregister && call.what == hub.region.data();
      });
      ASSERT_NE(region, log.end());
      EXPECT_EQ(std::count_if(log.begin(), region,
                              [&](const VerbsLog::Call& call) {
                                return call.verb == VerbsLog::Verb::destroy_queue_pair &&
                                       call.context == region->context;
                              }),
                3);
    }
  }
}

TEST(RdmaQueuePairs, ARegionThatIsRemovedIsGoneFromAllOfThem) {
  constexpr std::size_t count = 256;
  Node node(count, with_pairs(3));
  Node peer(count, with_pairs(3));
  node.connect("node", "peer", peer);
  std::vector<std::byte> more(count * page_size);
  const std::uint32_t number = peer.channel->add_region({more.data(), more.size(), page_size});
  node.fill(9);
  const auto all = indexes(count);
  std::error_code ec;
  ASSERT_TRUE(eventually([&] {
    node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = all, .remote_region = number},
                                ec);
    return ec != errc::unknown_region;
  }));
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_TRUE(same(node.region, more));
  peer.channel->remove_region(number);
  std::ranges::fill(more, std::byte{0});
  node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = all, .remote_region = number},
                              ec);
  EXPECT_EQ(ec, errc::region_gone) << ec.message();
  EXPECT_TRUE(std::ranges::all_of(more, [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_EQ(pairs_of(node, "peer"), 3U) << "the connection goes on";
  EXPECT_FALSE(move_pages(node, count, true));
}

}  // namespace
}  // namespace kvferry::rdma::testing
