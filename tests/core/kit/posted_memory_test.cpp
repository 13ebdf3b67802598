// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/posted_memory.hpp>

#include <gtest/gtest.h>

#include <memory>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

constexpr std::size_t due = PostedMemory::due_bytes;

TEST(PostedMemory, APeerHasItsShareAndNoMore) {
  const auto all = std::make_shared<PostedMemory>(PostedMemory::Bounds{10 * due, 2 * due});
  PostedMemory::Share share(all);
  EXPECT_TRUE(share.take(2 * due));
  EXPECT_FALSE(share.take(1));
  EXPECT_FALSE(share.take(~std::size_t{0})) << "an overflow";
  share.give_back(1);
  EXPECT_TRUE(share.take(1));
  EXPECT_EQ(all->bytes(), 2 * due);
}

TEST(PostedMemory, WhereOthersHaveTakenAllAPeerStillHasItsDue) {
  const auto all = std::make_shared<PostedMemory>(PostedMemory::Bounds{2 * due, 2 * due});
  PostedMemory::Share greedy(all);
  PostedMemory::Share modest(all);
  EXPECT_TRUE(greedy.take(2 * due));
  EXPECT_TRUE(modest.take(due));
  EXPECT_FALSE(modest.take(1));
  greedy.give_back(2 * due);
  EXPECT_TRUE(modest.take(1));
}

TEST(PostedMemory, AShareThatEndsGivesBackAll) {
  const auto all = std::make_shared<PostedMemory>(PostedMemory::Bounds{2 * due, 2 * due});
  {
    PostedMemory::Share share(all);
    EXPECT_TRUE(share.take(2 * due));
  }
  EXPECT_EQ(all->bytes(), 0U);
}

}  // namespace
}  // namespace kvferry::kit
