// SPDX-License-Identifier: Apache-2.0
// Peers that have each other's keys, of a channel that isolates its peers and of one that doesn't.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <cstddef>
#include <future>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/rdma_error.hpp>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

constexpr std::byte of_owner{0x11};
constexpr std::byte of_thief{0x66};

using Keys = std::vector<std::vector<RegionKeys>>;  ///< Of each rail.

class IsolatedPeers : public ::testing::TestWithParam<bool> {
 protected:
  struct Case {
    std::size_t rails;
    bool writes;
  };

  [[nodiscard]] static Node owner_of(std::size_t rails) {
    NodeOptions options{.rails = rails};
    options.channel.isolate_peers = GetParam();
    options.channel.stripe_threshold = page_size;
    return Node(4, std::move(options));
  }

  /// A peer that notes the keys that it is told, or takes others for them.
  [[nodiscard]] static Node peer_with(Keys& keys, bool stolen, std::size_t rails) {
    NodeOptions options{.rails = rails};
    options.channel.stripe_threshold = page_size;
    options.heard = [&keys, stolen](Endpoint& endpoint) {
      if (!stolen) {
        keys.clear();
      }
      for (std::size_t i = 0; i < endpoint.rails.size(); ++i) {
        if (stolen) {
          endpoint.rails[i].regions = keys.at(i);
        } else {
          keys.push_back(endpoint.rails[i].regions);
        }
      }
    };
    return Node(4, std::move(options));
  }

  /// With the owner's pages 0 to 3.
  static std::error_code access(const Node& peer, bool writes) {
    const auto all = indexes(4);
    const TransferSpec spec{.peer_id = "owner", .remote_indexes = all};
    std::error_code ec;
    if (writes) {
      peer.channel->batched_write(peer.pages(4), spec, ec);
    } else {
      peer.channel->batched_read(peer.pages(4), spec, ec);
    }
    return ec;
  }

  /// The result of a thief's write or read with others' keys.
  static void expect_closed(bool closed, const Node& owner, const Node& thief, bool writes) {
    const auto error = access(thief, writes);
    if (closed && thief.channel->rails().size() > 1) {
      // As the rail says that breaks first: by this, or because the owner has broken the other one.
      EXPECT_EQ(error, condition::peer_failed) << error.message();
    } else {
      EXPECT_EQ(error, closed ? std::error_code(wc_status::remote_access_error) : std::error_code());
    }
    EXPECT_TRUE(owner.holds(!closed && writes ? of_thief : of_owner));
    EXPECT_TRUE(thief.holds(!closed && !writes ? of_owner : of_thief));
  }
};

TEST_P(IsolatedPeers, ThatUseAnothersKeysAreRefusedByTheAdapter) {
  for (const auto& [rails, writes] : {Case{1, true}, Case{1, false}, Case{2, true}, Case{2, false}}) {
    SCOPED_TRACE(std::to_string(rails) + " rails, " + (writes ? "write" : "read"));
    const Node owner = owner_of(rails);
    owner.fill(of_owner);
    Keys keys;
    const Node honest = peer_with(keys, false, rails);
    honest.connect("honest", "owner", owner);
    ASSERT_EQ(keys.size(), rails);
    const Node thief = peer_with(keys, true, rails);
    thief.fill(of_thief);
    thief.connect("thief", "owner", owner);
    expect_closed(GetParam(), owner, thief, writes);
    EXPECT_FALSE(access(honest, false)) << "the honest peer goes on";
  }
}

TEST_P(IsolatedPeers, ThatUseTheKeysOfOneWhoIsDisconnectedAreRefusedByTheAdapter) {
  for (const bool writes : {true, false}) {
    for (const bool by_owner : {true, false}) {
      SCOPED_TRACE(std::string(writes ? "write" : "read") + (by_owner ? ", disconnected by the owner" : ", by the peer"));
      const Node owner = owner_of(1);
      owner.fill(of_owner);
      Keys keys;
      const Node first = peer_with(keys, false, 1);
      first.connect("first", "owner", owner);
      EXPECT_FALSE(access(first, false));
      if (by_owner) {
        owner.channel->disconnect("first");
      } else {
        first.channel->disconnect("owner");
      }
      const Node thief = peer_with(keys, true, 1);
      thief.fill(of_thief);
      thief.connect("thief", "owner", owner);
      expect_closed(GetParam(), owner, thief, writes);
    }
  }
}

TEST_P(IsolatedPeers, MoveWhatLiesInRegionsAndWhatDoesnt) {
  const Node owner = owner_of(2);
  Keys keys;
  const Node peer = peer_with(keys, false, 2);
  peer.connect("peer", "owner", owner);
  peer.fill(1);
  EXPECT_FALSE(access(peer, true));
  EXPECT_TRUE(same(owner, peer));
  // The owner's own requests, of memory in regions, of little beside them and of much.
  for (const std::size_t bytes : {std::size_t{100}, 64 * page_size}) {
    std::vector<std::byte> sent(bytes, std::byte{5});
    std::vector<std::byte> got(bytes);
    const std::vector<MutableBuffer> from{sent};
    const std::vector<MutableBuffer> to{got};
    auto receiving = peer.channel->async_batched_recv(to, {.peer_id = "owner", .tag = bytes}, asio::use_future);
    EXPECT_EQ(owner.channel->batched_send(from, {.peer_id = "peer", .tag = bytes}), 1U);
    ASSERT_EQ(receiving.wait_for(long_enough), std::future_status::ready);
    EXPECT_EQ(got, sent);
    const auto index = indexes(1);
    const std::vector<MutableBuffer> part{from[0].first(100)};
    EXPECT_EQ(owner.channel->batched_write(part, {.peer_id = "peer", .remote_indexes = index}), 1U);
    EXPECT_EQ(peer.region[99], std::byte{5});
  }
  EXPECT_EQ(owner.channel->batched_read(owner.pages(4), {.peer_id = "peer", .remote_indexes = indexes(4)}), 4U);
  EXPECT_TRUE(same(owner, peer));
}

INSTANTIATE_TEST_SUITE_P(Rdma, IsolatedPeers, ::testing::Bool(),
                         [](const auto& tested) { return tested.param ? "Isolated" : "NotIsolated"; });

}  // namespace
}  // namespace kvferry::rdma::testing
