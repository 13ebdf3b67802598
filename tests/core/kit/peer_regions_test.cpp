// SPDX-License-Identifier: Apache-2.0
// Regions of a peer: who waits for one that is not known yet.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/region_table.hpp>

#include "peers_regions.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

TEST_F(PeersRegions, AnUnknownOneIsAskedForOnceAndNewsOfItLetTheOperationGoOn) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto first = start(1);
  const auto second = start(2);
  ASSERT_EQ(link->questions.size(), 1U) << "one question at a time";
  ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, 1}));
  ASSERT_TRUE(host_->peer_region_added({32, 16, Access::write, 1})) << "no news";
  link->questions[0]();
  ASSERT_TRUE(run_until([&] { return link->questions.size() == 2; }));
  EXPECT_TRUE(ends_.empty()) << "the first one is with the link";
  link->questions[1]();
  ASSERT_TRUE(run_until([&] { return !ends_.empty(); }));
  EXPECT_EQ(ends_, std::vector<std::error_code>{errc::unknown_region});
  EXPECT_FALSE(first->finished());
  EXPECT_TRUE(second->finished());
  host_->peer_region_removed(1);
  host_->peer_region_removed(1);
  ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, 1})) << "late, on another connection of the link";
  (void)start(1);
  EXPECT_EQ(ends_.back(), errc::region_gone);
  const auto info = directory_->info("p");
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->regions, (std::vector<RemoteRegion>{{64, 16, Access::read_write, 0}}));
  link->end_all({}, {});
}

TEST_F(PeersRegions, AQuestionThatTheLinkHasDroppedIsAskedAgain) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  (void)start(1);
  ASSERT_EQ(link->questions.size(), 1U);
  const auto begun = Clock::now();
  ASSERT_TRUE(run_until([&] { return Clock::now() - begun > std::chrono::milliseconds(1100); }));
  (void)start(1);
  ASSERT_EQ(link->questions.size(), 2U);
  link->questions[1]();
  ASSERT_TRUE(run_until([&] { return ends_.size() == 2; }));
  EXPECT_EQ(ends_, std::vector<std::error_code>(2, errc::unknown_region));
}

TEST_F(PeersRegions, WhoAskedOnALinkThatBreaksIsNotLost) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto asks = start(1);
  host_->link_failed(*link, errc::connection_lost);
  ASSERT_TRUE(run_until([&] { return !ends_.empty(); }));
  EXPECT_EQ(ends_, std::vector<std::error_code>{errc::connection_lost}) << "the peer's init url is not known";
}

TEST_F(PeersRegions, APeerHasNoMoreThanItMay) {
  connect(std::make_shared<RegionsLink>());
  for (std::uint32_t number = 1; number < RegionTable::max_regions; ++number) {
    ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, number}));
  }
  EXPECT_FALSE(host_->peer_region_added({64, 16, Access::write, RegionTable::max_regions}));
  host_->peer_region_removed(5);
  EXPECT_TRUE(host_->peer_region_added({64, 16, Access::write, RegionTable::max_regions}));
}

}  // namespace
}  // namespace kvferry::kit::tests
