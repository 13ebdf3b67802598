// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/attempt_slots.hpp>

#include <gtest/gtest.h>

#include <optional>
#include <string>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

TEST(AttemptSlots, ANewOneOfAnotherSourceDisplacesTheOldestOfTheGreediest) {
  AttemptSlots slots(8);
  EXPECT_EQ(slots.enter("honest", "10.0.0.1"), std::nullopt);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(slots.enter("flood-" + std::to_string(i), "10.0.0.2"), std::nullopt);
  }
  EXPECT_EQ(slots.enter("flood-6", "10.0.0.2"), "flood-0") << "a source has three quarters";
  EXPECT_EQ(slots.enter("another", "10.0.0.3"), std::nullopt);
  EXPECT_EQ(slots.enter("newcomer", "10.0.0.4"), "flood-1");
  EXPECT_EQ(slots.size(), 8U);
}

TEST(AttemptSlots, AnIdHasOneSlot) {
  AttemptSlots slots(4);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(slots.enter("again", "10.0.0." + std::to_string(i % 3)), std::nullopt);
  }
  EXPECT_EQ(slots.size(), 1U);
  slots.leave("again");
  slots.leave("again");
  EXPECT_EQ(slots.size(), 0U);
}

}  // namespace
}  // namespace kvferry::kit
