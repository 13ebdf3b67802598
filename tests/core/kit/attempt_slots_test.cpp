// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/attempt_slots.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// @return the number of who gives way.
std::optional<std::uint64_t> enter(AttemptSlots& slots, std::uint64_t number, const std::string& source) {
  const auto displaced = slots.enter({"p" + std::to_string(number), number}, source);
  EXPECT_TRUE(!displaced || displaced->peer_id == "p" + std::to_string(displaced->number));
  return displaced ? std::optional(displaced->number) : std::nullopt;
}

TEST(AttemptSlots, ANewOneOfAnotherSourceDisplacesTheOldestOfTheGreediest) {
  AttemptSlots slots(8);
  EXPECT_EQ(enter(slots, 100, "10.0.0.1"), std::nullopt);
  for (std::uint64_t flood = 1; flood <= 6; ++flood) {
    EXPECT_EQ(enter(slots, flood, "10.0.0.2"), std::nullopt);
  }
  EXPECT_EQ(enter(slots, 7, "10.0.0.2"), 1U) << "a source has three quarters";
  EXPECT_EQ(enter(slots, 101, "10.0.0.3"), std::nullopt);
  EXPECT_EQ(enter(slots, 102, "10.0.0.4"), 2U);
  EXPECT_EQ(slots.size(), 8U);
}

TEST(AttemptSlots, AreCrowdedLongBeforeTheyAreFull) {
  AttemptSlots slots(64);
  for (std::uint64_t number = 1; number <= 3; ++number) {
    EXPECT_EQ(enter(slots, number, "10.0.0.1"), std::nullopt);
    EXPECT_FALSE(slots.crowded());
  }
  EXPECT_EQ(enter(slots, 4, "10.0.0.2"), std::nullopt);
  EXPECT_TRUE(slots.crowded());
  slots.leave(1);
  EXPECT_FALSE(slots.crowded());
}

TEST(AttemptSlots, OneAloneIsNoCrowd) {
  AttemptSlots slots(4);
  EXPECT_EQ(enter(slots, 1, "10.0.0.1"), std::nullopt);
  EXPECT_FALSE(slots.crowded());
  EXPECT_EQ(enter(slots, 2, "10.0.0.1"), std::nullopt);
  EXPECT_TRUE(slots.crowded());
}

TEST(AttemptSlots, AttemptsOfOneIdHaveASlotEach) {
  AttemptSlots slots(4);
  EXPECT_FALSE(slots.enter({"p", 1}, "10.0.0.1"));
  EXPECT_FALSE(slots.enter({"p", 2}, "10.0.0.1"));
  EXPECT_EQ(slots.size(), 2U);
  slots.leave(1);
  slots.leave(1);
  EXPECT_EQ(slots.size(), 1U);
  slots.leave(2);
  EXPECT_EQ(slots.size(), 0U);
}

}  // namespace
}  // namespace kvferry::kit
