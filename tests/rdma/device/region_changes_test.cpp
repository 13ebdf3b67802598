// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <vector>

#include <kvferry/rdma_error.hpp>

#include "rdma/message.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// A peer that keeps a removed region's keys, and takes them for those of another one.
TEST(RdmaRegionChanges, AKeyOfARemovedRegionOpensNothing) {
  for (const std::size_t rails : {1U, 2U}) {
    for (const bool writes : {true, false}) {
      SCOPED_TRACE(std::to_string(rails) + " rails, " + (writes ? "write" : "read"));
      Node owner(4, {.rails = rails});
      owner.fill(std::byte{0x11});
      std::vector<std::byte> memory(4 * page_size, std::byte{0x22});
      const std::uint32_t number = owner.channel->add_region({memory.data(), memory.size(), page_size});
      NodeOptions believes{.rails = rails};
      believes.heard = [](Endpoint& endpoint) {
        for (RailEndpoint& rail : endpoint.rails) {
          ASSERT_EQ(rail.regions.size(), 2U);
          rail.regions[0] = rail.regions[1];
          rail.regions[0].number = 0;
        }
      };
      Node peer(4, std::move(believes));
      peer.fill(std::byte{0x33});
      peer.connect("peer", "owner", owner);
      const auto access = [&] {
        std::error_code ec;
        const auto index = indexes(1);
        const TransferSpec spec{.peer_id = "owner", .remote_indexes = index};
        if (writes) {
          peer.channel->batched_write(peer.pages(1), spec, ec);
        } else {
          peer.channel->batched_read(peer.pages(1), spec, ec);
        }
        return ec;
      };
      EXPECT_FALSE(access());
      EXPECT_EQ(memory[0], writes ? std::byte{0x33} : std::byte{0x22}) << "the keys open it";
      EXPECT_TRUE(owner.holds(std::byte{0x11}));
      owner.channel->remove_region(number);
      std::ranges::fill(memory, std::byte{0x44});
      peer.fill(std::byte{0x55});
      EXPECT_EQ(access(), wc_status::remote_access_error);
      EXPECT_TRUE(std::ranges::all_of(memory, [](std::byte byte) { return byte == std::byte{0x44}; }));
      EXPECT_TRUE(peer.holds(std::byte{0x55}));
    }
  }
}

TEST(RdmaRegionChanges, ARegionOfTooManySlicesIsRefusedAndLeavesNothing) {
  NodeOptions options{.rails = 2};
  options.channel.slice_bytes = page_size;
  Node node(4, std::move(options));
  std::vector<std::byte> memory(rdma::max_region_keys * page_size + page_size);
  std::error_code ec;
  EXPECT_EQ(node.channel->add_region({memory.data(), memory.size(), page_size}, ec), 0U);
  EXPECT_EQ(ec, errc::resource_limit);
  EXPECT_EQ(node.channel->regions().size(), 1U);
  EXPECT_EQ(node.channel->add_region({memory.data(), memory.size() - page_size, page_size}, ec), 1U);
  EXPECT_FALSE(ec) << ec.message();
}

}  // namespace
}  // namespace kvferry::rdma::testing
