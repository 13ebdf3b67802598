// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/stranger_links.hpp>

#include <gtest/gtest.h>

#include <chrono>
#include <set>
#include <string>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// The oldest of those of which one has to go; empty if there is room, "-" if there is neither room nor one of those.
std::string gives_way(const StrangerLinks& links, const std::string& source, std::size_t descriptors = 1) {
  const auto* const ids = links.greedy(source, descriptors);
  return ids == nullptr ? "" : ids->empty() ? "-" : ids->front();
}

TEST(StrangerLinks, ASourceHasThreeQuartersAndAllTogetherHaveAll) {
  StrangerLinks links({8, 100});
  links.enter("honest", "10.0.0.1", 1);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(gives_way(links, "10.0.0.2"), "") << i;
    links.enter("flood-" + std::to_string(i), "10.0.0.2", 1);
  }
  EXPECT_EQ(gives_way(links, "10.0.0.2"), "flood-0");
  EXPECT_EQ(gives_way(links, "10.0.0.3"), "");
  links.enter("another", "10.0.0.3", 1);
  EXPECT_EQ(gives_way(links, "10.0.0.4"), "flood-0") << "of the source that has most";
  links.leave("flood-0");
  EXPECT_EQ(gives_way(links, "10.0.0.4"), "");
}

TEST(StrangerLinks, DescriptorsCountAsWell) {
  StrangerLinks links({100, 16});
  links.enter("wide", "10.0.0.1", 8);
  EXPECT_EQ(gives_way(links, "10.0.0.1", 4), "") << "12 of 16";
  EXPECT_EQ(gives_way(links, "10.0.0.1", 5), "wide");
  EXPECT_EQ(gives_way(links, "10.0.0.2", 8), "");
  EXPECT_EQ(gives_way(links, "10.0.0.2", 9), "wide");
  EXPECT_EQ(gives_way(links, "10.0.0.2", 17), "-");
}

TEST(StrangerLinks, MoreDescriptorsMakeMoreRoomAndFewerTakeNoneAway) {
  StrangerLinks links({100, 8});
  for (int i = 0; i < 6; ++i) {
    links.enter(std::to_string(i), "10.0.0.1", 1);
  }
  EXPECT_EQ(gives_way(links, "10.0.0.1"), "0") << "a source has three quarters";
  links.raise({100, 16});
  EXPECT_EQ(gives_way(links, "10.0.0.1", 6), "");
  EXPECT_EQ(gives_way(links, "10.0.0.1", 7), "0");
  EXPECT_EQ(gives_way(links, "10.0.0.2", 10), "");
  links.raise({100, 4});
  EXPECT_EQ(gives_way(links, "10.0.0.1", 6), "");
}

TEST(StrangerLinks, WhoWasNeverUsedGoesFirstAndThenWhoHasBeenIdleForLongest) {
  using namespace std::chrono_literals;
  StrangerLinks links({4, 100});
  for (const std::string id : {"a", "b", "c"}) {
    links.enter(id, "10.0.0.1", 1);
  }
  const auto* const ids = links.greedy("10.0.0.1", 1);
  ASSERT_NE(ids, nullptr);
  const auto began = StrangerLinks::Clock::now();
  // The link that would give way when so much time has passed and these have been used meanwhile; empty if none.
  const auto goes = [&](std::chrono::seconds passed, const std::set<std::string>& used) {
    const auto* const id = links.idle(*ids, began + passed, [&](const std::string& one) { return used.contains(one); });
    return id == nullptr ? std::string() : *id;
  };
  EXPECT_EQ(goes(0s, {"a"}), "b") << "it was never used";
  EXPECT_EQ(goes(0s, {"a", "b", "c"}), "");
  EXPECT_EQ(goes(59s, {}), "") << "all were used a minute ago";
  EXPECT_EQ(goes(59s, {"a", "c"}), "");
  EXPECT_EQ(goes(60s, {}), "b");
  EXPECT_EQ(goes(100s, {"c"}), "b") << "used, but not for a minute";
  EXPECT_EQ(goes(119s, {"b"}), "a");
  EXPECT_EQ(goes(119s, {"a", "b"}), "");
  const auto of_b = links.seen_used("b");
  EXPECT_TRUE(of_b);
  links.leave("b");
  links.enter("b", "10.0.0.1", 1, of_b);
  EXPECT_EQ(goes(119s, {}), "") << "the same link again, which was used";
  links.leave("b");
  links.enter("b", "10.0.0.1", 1);
  EXPECT_EQ(goes(119s, {}), "b") << "a new link, never used";
}

TEST(StrangerLinks, AnIdHasOneLink) {
  StrangerLinks links({4, 8});
  for (int i = 0; i < 100; ++i) {
    links.enter("again", "10.0.0." + std::to_string(i % 3), 2);
  }
  EXPECT_EQ(links.used().links, 1U);
  EXPECT_EQ(links.used().descriptors, 2U);
  links.leave("again");
  links.leave("again");
  EXPECT_EQ(links.used().links, 0U);
  EXPECT_EQ(links.used().descriptors, 0U);
}

}  // namespace
}  // namespace kvferry::kit
