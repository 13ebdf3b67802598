// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/poller.hpp>

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// Finds something so many times, and from then on what it is told.
class Connection final : public Pollable {
 public:
  explicit Connection(int finds, Found then = Found::nothing, Found first = Found::something)
      : finds_(finds), then_(then), first_(first) {}

  Found poll() override {
    ++polls;
    return polls <= finds_ ? first_ : then_;
  }
  void rest() override { ++rests; }

  int polls = 0;
  int rests = 0;

 private:
  const int finds_;
  const Found then_;
  const Found first_;
};

void nothing_else() {}

TEST(Poller, NobodyLooksWithoutAnIoThread) {
  Poller poller(PollPolicy{std::chrono::microseconds(10)});
  EXPECT_FALSE(poller.watch(std::make_shared<Connection>(0)));
}

TEST(Poller, NeverMeansNever) {
  Poller poller(PollPolicy::never());
  poller.enter();
  EXPECT_FALSE(poller.watch(std::make_shared<Connection>(0)));
}

TEST(Poller, AConnectionOnWhichNothingHappensIsLeftToItsEvents) {
  Poller poller(PollPolicy{std::chrono::microseconds(10)});
  poller.enter();
  const auto connection = std::make_shared<Connection>(1000);
  ASSERT_TRUE(poller.watch(connection));
  poller.look(nothing_else);
  EXPECT_GT(connection->polls, 1000);
  EXPECT_EQ(connection->rests, 1);
  poller.look(nothing_else);
  EXPECT_EQ(connection->rests, 1);
}

/// Whoever has it watched relies on that: no event is asked for.
TEST(Poller, WithoutMemoryAConnectionIsLookedAtAllTheSame) {
  Poller poller(PollPolicy{std::chrono::microseconds(10)});
  poller.enter();
  const auto connection = std::make_shared<Connection>(1000);
  test::allocations_left = 0;
  bool watched = false;
  try {
    watched = poller.watch(connection);
    poller.look(nothing_else);
  } catch (const std::bad_alloc&) {
    // As `IoThreads` does.
  }
  test::allocations_left = test::unlimited_allocations;
  EXPECT_TRUE(watched);
  EXPECT_GT(connection->polls, 1000);
  EXPECT_EQ(connection->rests, 1);
}

/// Moves something for a while, so many times, and then has nothing.
class SlowConnection final : public Pollable {
 public:
  explicit SlowConnection(std::chrono::milliseconds busy, int finds = 1) : busy_(busy), finds_(finds) {}

  Found poll() override {
    if (++polls <= finds_) {
      const auto end = std::chrono::steady_clock::now() + busy_;
      while (std::chrono::steady_clock::now() < end) {
      }
      return Found::something;
    }
    return Found::nothing;
  }
  void rest() override { ++rests; }

  int polls = 0;
  int rests = 0;

 private:
  const std::chrono::milliseconds busy_;
  const int finds_;
};

TEST(Poller, PatienceBeginsWhenWhatWasFoundHasBeenMoved) {
  Poller poller(PollPolicy{std::chrono::milliseconds(500)});
  poller.enter();
  const auto connection = std::make_shared<SlowConnection>(std::chrono::milliseconds(600));
  ASSERT_TRUE(poller.watch(connection));
  poller.look(nothing_else);
  EXPECT_GT(connection->polls, 100) << "looked at hardly at all after the long move";
  EXPECT_EQ(connection->rests, 1);
}

TEST(Poller, WhatOthersMoveDoesNotUseUpPatience) {
  Poller poller(PollPolicy{std::chrono::microseconds(10)});
  poller.enter();
  const auto slow = std::make_shared<SlowConnection>(std::chrono::milliseconds(1), 10);
  const auto idle = std::make_shared<Connection>(0);
  ASSERT_TRUE(poller.watch(slow));
  ASSERT_TRUE(poller.watch(idle));
  poller.look(nothing_else);
  EXPECT_GT(idle->polls, 10) << "given up while the other one moved";
  EXPECT_EQ(idle->rests, 1);
}

TEST(Poller, AReleasedConnectionIsNotTouchedAgain) {
  Poller poller(PollPolicy::always());
  poller.enter();
  const auto connection = std::make_shared<Connection>(3, Pollable::Found::released);
  ASSERT_TRUE(poller.watch(connection));
  poller.look(nothing_else);
  EXPECT_EQ(connection->polls, 4);
  EXPECT_EQ(connection->rests, 0);
  EXPECT_EQ(connection.use_count(), 1);
}

TEST(Poller, EverythingElseIsRunMeanwhile) {
  Poller poller(PollPolicy::always());
  poller.enter();
  const auto first = std::make_shared<Connection>(1'000'000, Pollable::Found::released);
  const auto second = std::make_shared<Connection>(10, Pollable::Found::released);
  ASSERT_TRUE(poller.watch(first));
  int runs = 0;
  poller.look([&] {
    if (++runs == 5) {
      EXPECT_TRUE(poller.watch(second));
    }
  });
  EXPECT_GE(runs, 5);
  EXPECT_EQ(second->polls, 11);
}

TEST(Poller, HandlersAreRunWheneverSomethingHasCompleted) {
  Poller poller(PollPolicy::always());
  poller.enter();
  const auto connection = std::make_shared<Connection>(1000, Pollable::Found::released, Pollable::Found::completed);
  ASSERT_TRUE(poller.watch(connection));
  int runs = 0;
  poller.look([&] {
    ++runs;
    if (connection->polls <= 1000) {
      EXPECT_EQ(connection->polls, runs);
    }
  });
  EXPECT_GE(runs, 1000);
}

TEST(Poller, NotMoreThanItCanLookAt) {
  Poller poller(PollPolicy{std::chrono::microseconds(10)});
  poller.enter();
  std::vector<std::shared_ptr<Connection>> connections;
  for (int i = 0; i < 100; ++i) {
    connections.push_back(std::make_shared<Connection>(0));
  }
  std::size_t watched = 0;
  for (const auto& connection : connections) {
    watched += poller.watch(connection) ? 1U : 0U;
  }
  EXPECT_GT(watched, 0U);
  EXPECT_LT(watched, connections.size());
  poller.look(nothing_else);
  EXPECT_TRUE(poller.watch(connections.back())) << "there is room again";
  poller.look(nothing_else);
}

TEST(Poller, WhileOneThreadLooksAnotherNeedNot) {
  Poller poller(PollPolicy::always());
  poller.enter();
  ASSERT_TRUE(poller.watch(std::make_shared<Connection>(1, Pollable::Found::released)));
  bool tried = false;
  bool accepted = false;
  poller.look([&] {
    if (!tried) {
      tried = true;
      std::thread([&] {
        accepted = poller.watch(std::make_shared<Connection>(0, Pollable::Found::released));
        poller.enter();
        poller.look([] { ADD_FAILURE() << "two threads look"; });
      }).join();
    }
  });
  EXPECT_TRUE(accepted) << "there is a thread that looks";
}

}  // namespace
}  // namespace kvferry::kit
