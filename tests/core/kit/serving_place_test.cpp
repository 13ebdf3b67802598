// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/serving_place.hpp>

#include <gtest/gtest.h>

#include <sched.h>

#include <memory>
#include <thread>

#include "common/nicer.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

TEST(ThreadRank, FollowsTheSystemsOrder) {
  constexpr int deadline_policy = 6;
  EXPECT_GT(ThreadRank::of(deadline_policy, 0, 0), ThreadRank::of(SCHED_FIFO, 99, 0));
  EXPECT_GT(ThreadRank::of(SCHED_FIFO, 90, 0), ThreadRank::of(SCHED_RR, 89, 0));
  EXPECT_EQ(ThreadRank::of(SCHED_FIFO, 5, 0), ThreadRank::of(SCHED_RR, 5, 0));
  EXPECT_GT(ThreadRank::of(SCHED_FIFO, 1, 0), ThreadRank::of(SCHED_OTHER, 0, -20));
  EXPECT_GT(ThreadRank::of(SCHED_OTHER, 0, -20), ThreadRank::of(SCHED_OTHER, 0, 19));
  EXPECT_EQ(ThreadRank::of(SCHED_OTHER, 0, 3), ThreadRank::of(SCHED_BATCH, 0, 3));
  EXPECT_GT(ThreadRank::of(SCHED_OTHER, 0, 19), ThreadRank::of(SCHED_IDLE, 0, -20));
}

class ServingPlaceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!test::may_be_nicer()) {
      GTEST_SKIP() << "no thread of this process can be nicer than others";
    }
  }

  [[nodiscard]] bool is_for_a_nicer_thread() {
    bool taken = false;
    std::thread([&] {
      EXPECT_TRUE(test::be_nicer());
      taken = place_.take();
    }).join();
    return taken;
  }

  std::shared_ptr<IoThreadRank> others_ = std::make_shared<IoThreadRank>();
  ServingPlace place_{others_};
};

TEST_F(ServingPlaceTest, IsForOneThreadAtATime) {
  EXPECT_FALSE(place_.is_of_this_thread());
  ASSERT_TRUE(place_.take());
  EXPECT_TRUE(place_.is_of_this_thread());
  std::thread([&] {
    EXPECT_FALSE(place_.take());
    EXPECT_FALSE(place_.is_of_this_thread());
  }).join();
  place_.leave();
  EXPECT_FALSE(place_.is_of_this_thread());
  EXPECT_TRUE(place_.take());
}

TEST_F(ServingPlaceTest, IsNotForAThreadThatRunsAfterTheOthers) {
  EXPECT_FALSE(is_for_a_nicer_thread());
  EXPECT_TRUE(place_.take());
}

TEST_F(ServingPlaceTest, IsForAThreadThatRunsNoLaterThanTheLastOneOfTheOthers) {
  std::thread([&] {
    EXPECT_TRUE(test::be_nicer());
    others_->note_this_thread();
  }).join();
  EXPECT_TRUE(is_for_a_nicer_thread());
}

TEST_F(ServingPlaceTest, IsToBeLeftAtTheSecondSleepOfAThreadThatIsNicerByThen) {
  std::thread([&] {
    for (int call = 0; call < 2; ++call) {
      ASSERT_TRUE(place_.take());
      EXPECT_TRUE(place_.may_sleep());
      EXPECT_TRUE(place_.may_sleep());
      place_.leave();
    }
    ASSERT_TRUE(place_.take());
    EXPECT_TRUE(test::be_nicer());
    EXPECT_TRUE(place_.may_sleep());
    EXPECT_FALSE(place_.may_sleep());
    place_.leave();
  }).join();
}

}  // namespace
}  // namespace kvferry::kit
