// SPDX-License-Identifier: Apache-2.0
// How regions are registered: with which rights, and how many at a time.
#include <gtest/gtest.h>

#include <infiniband/verbs.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>

#include "noted_verbs.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

std::vector<VerbsLog::Call> registrations() {
  const std::lock_guard lock(verbs_log().mutex);
  std::vector<VerbsLog::Call> all;
  std::ranges::copy_if(verbs_log().calls, std::back_inserter(all),
                       [](const VerbsLog::Call& call) { return call.verb == VerbsLog::Verb::do_register; });
  return all;
}

bool is_registered(const void* memory) {
  return std::ranges::any_of(registrations(), [&](const VerbsLog::Call& call) { return call.what == memory; });
}

TEST(Registration, OnlyRegionsAreWrittenInAnyOrderAndOnlyWhereThatIsWanted) {
  for (const bool relaxed : {false, true}) {
    verbs_log().clear();
    NodeOptions options;
    options.channel.relaxed_ordering = relaxed;
    Node node(64, options);
    Node peer(64, options);
    node.connect("node", "peer", peer);
    node.fill(relaxed ? 1 : 2);
    const std::vector<std::byte> notification(8, std::byte{3});
    EXPECT_EQ(node.channel->batched_write(
                  node.pages(64), {.peer_id = "peer", .remote_indexes = indexes(64), .notification = notification}),
              64U);
    EXPECT_EQ(peer.channel->receive_notification(long_enough).payload, notification);
    EXPECT_TRUE(same(node, peer));
    std::vector<std::byte> late(8 * page_size);
    (void)node.channel->add_region({late.data(), late.size(), page_size});
    std::size_t regions = 0;
    for (const VerbsLog::Call& call : registrations()) {
      const bool is_region =
          call.what == node.region.data() || call.what == peer.region.data() || call.what == late.data();
      regions += is_region ? 1U : 0U;
      EXPECT_EQ((call.access & IBV_ACCESS_RELAXED_ORDERING) != 0, relaxed && is_region)
          << (is_region ? "a region" : "messages, which have to come behind all else");
    }
    EXPECT_EQ(regions, 3U);
  }
}

constexpr std::size_t large_pages = (std::size_t{64} << 20) / page_size;

TEST(Registration, SlicesOfALargeRegionAreRegisteredSideBySide) {
  constexpr std::size_t slice = std::size_t{16} << 20;
  verbs_log().clear();
  // It waits for another one, which wouldn't begin before it has ended.
  std::optional<bool> another;
  std::vector<std::byte> memory(large_pages * page_size);
  before_registering().set(memory.data(),
                           [&] { another = eventually([&] { return is_registered(memory.data() + slice); }); });
  RdmaOptions options;
  options.rails = first_rails(1);
  options.slice_bytes = slice;
  options.regions = {{memory.data(), memory.size(), page_size}};
  RdmaTransferChannel channel(options);
  EXPECT_EQ(another, true);
  for (std::size_t begin = 0; begin < memory.size(); begin += slice) {
    EXPECT_TRUE(is_registered(memory.data() + begin));
  }
}

TEST(Registration, LargeRegionsAreRegisteredSideBySide) {
  verbs_log().clear();
  std::optional<bool> another;
  std::vector<std::byte> memory(large_pages * page_size);
  std::byte* const second = memory.data() + memory.size() / 2;
  before_registering().set(memory.data(), [&] { another = eventually([&] { return is_registered(second); }); });
  RdmaOptions options;
  options.rails = first_rails(1);
  options.regions = {{memory.data(), memory.size() / 2, page_size}, {second, memory.size() / 2, page_size}};
  RdmaTransferChannel channel(options);
  EXPECT_EQ(another, true);
}

TEST(Registration, WhatIsNotLargeIsRegisteredByTheThreadThatAsksForIt) {
  constexpr std::size_t slice = std::size_t{1} << 20;
  std::vector<std::byte> memory((large_pages - 1) * page_size);
  verbs_log().clear();
  RdmaOptions options;
  options.rails = first_rails(1);
  options.slice_bytes = slice;
  options.regions = {{memory.data(), memory.size(), page_size}};
  RdmaTransferChannel channel(options);
  EXPECT_TRUE(is_registered(memory.data() + memory.size() / slice * slice));
  for (const VerbsLog::Call& call : registrations()) {
    EXPECT_NE(call.thread, "kvferry-reg");
  }
}

TEST(Registration, LargeRegionsAreRegisteredSideBySideForAnIsolatedPeer) {
  std::vector<std::byte> memory(large_pages * page_size);
  std::byte* const second = memory.data() + memory.size() / 2;
  NodeOptions options = isolating();
  options.channel.regions = {{memory.data(), memory.size() / 2, page_size}, {second, memory.size() / 2, page_size}};
  Node hub(1, options);
  Node peer(1);
  verbs_log().clear();
  std::optional<bool> another;
  before_registering().set(memory.data(), [&] { another = eventually([&] { return is_registered(second); }); });
  peer.connect("peer", "hub", hub);
  EXPECT_EQ(another, true);
  EXPECT_TRUE(is_registered(memory.data()));
  peer.channel->disconnect("hub");
  registering_fails_at = second;
  registrations_left = 0;
  try {
    peer.connect("peer", "hub", hub);
    ADD_FAILURE() << "it connected";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::resource_limit);
    EXPECT_NE(std::string(error.what()).find("region 1: RDMA device"), std::string::npos) << error.what();
  }
  registering_fails_at = nullptr;
  peer.connect("peer", "hub", hub);
}

TEST(Registration, ALargeRegionIsRegisteredOnSeveralRailsSideBySideOrOnNone) {
  std::vector<std::byte> memory(large_pages * page_size);
  RdmaOptions options;
  options.rails = first_rails(2);
  RdmaTransferChannel channel(options);
  verbs_log().clear();
  const auto count = [&] {
    return std::ranges::count_if(registrations(),
                                 [&](const VerbsLog::Call& call) { return call.what == memory.data(); });
  };
  std::optional<bool> another;
  before_registering().set(memory.data(), [&] { another = eventually([&] { return count() == 1; }); });
  const MemoryRegion region{memory.data(), memory.size(), page_size};
  const std::uint32_t number = channel.add_region(region);
  EXPECT_EQ(another, true);
  EXPECT_EQ(count(), 2);
  channel.remove_region(number);
  const auto deregistered = [&] {
    const std::lock_guard lock(verbs_log().mutex);
    return std::ranges::count_if(verbs_log().calls, [&](const VerbsLog::Call& call) {
      return call.verb == VerbsLog::Verb::deregister && call.what == memory.data();
    });
  };
  EXPECT_EQ(deregistered(), 2);
  verbs_log().clear();
  registering_fails_at = memory.data();
  registrations_left = 1;
  std::error_code ec;
  try {
    (void)channel.add_region(region);
  } catch (const TransferError& error) {
    ec = error.code();
  }
  registering_fails_at = nullptr;
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  EXPECT_EQ(count(), 1);
  EXPECT_EQ(deregistered(), 1) << "what one rail had got, before another one failed";
}

}  // namespace
}  // namespace kvferry::rdma::testing
