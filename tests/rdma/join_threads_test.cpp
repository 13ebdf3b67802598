// SPDX-License-Identifier: Apache-2.0
#include "rdma/join_threads.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <latch>
#include <new>
#include <thread>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::chrono::seconds long_enough{60};
constexpr kit::SideMessageQueue::Bounds bounds{100'000, 10'000};

TEST(JoinThreads, OneThatTakesItsTimeDelaysNoOther) {
  std::latch absent(1);
  std::latch blocked(JoinThreads::most - 1);
  JoinThreads threads(bounds);
  for (std::size_t i = 0; i + 1 < JoinThreads::most; ++i) {
    threads.run([&] {
      blocked.count_down();
      absent.wait();
    });
  }
  blocked.wait();
  for (int i = 0; i < 100; ++i) {
    std::promise<void> done;
    threads.run([&] { done.set_value(); });
    EXPECT_EQ(done.get_future().wait_for(long_enough), std::future_status::ready);
  }
  absent.count_down();
}

TEST(JoinThreads, WhatWaitsIsRunBeforeClosingAndLaterOnesInsideTheCall) {
  JoinThreads threads(bounds);
  std::atomic<int> ran{0};
  for (int i = 0; i < 1000; ++i) {
    threads.run([&] { ++ran; });
  }
  threads.close();
  EXPECT_EQ(ran, 1000);
  std::thread::id where;
  threads.run([&] { where = std::this_thread::get_id(); });
  EXPECT_EQ(where, std::this_thread::get_id());
  threads.close();
}

TEST(JoinThreads, MemoryThatIsUsedUpEndsTheCallAndNotTheProcess) {
  std::size_t allocations = 0;
  for (bool refused = true; refused && allocations < 1'000; ++allocations) {
    JoinThreads threads(bounds);
    std::atomic<bool> ran{false};
    bool thrown = false;
    test::allocation_refused = false;
    test::allocations_left = allocations;
    try {
      threads.run([&] { ran = true; });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    threads.close();
    EXPECT_NE(ran.load(), thrown) << "work that was taken is done";
  }
  EXPECT_GT(allocations, 1U) << "else this tests nothing";
}

TEST(JoinThreads, WhatStrangersLeaveWaitingIsBoundedAndSourcesTakeTurns) {
  std::latch absent(1);
  std::latch blocked(JoinThreads::most);
  JoinThreads threads(bounds);
  for (std::size_t i = 0; i < JoinThreads::most; ++i) {
    threads.run([&] {
      blocked.count_down();
      absent.wait();
    });
  }
  blocked.wait();
  std::atomic<int> greedy{0};
  int taken = 0;
  while (threads.run_for("greedy", 500, [&] { ++greedy; })) {
    ++taken;
    ASSERT_LT(taken, 1000);
  }
  EXPECT_GT(taken, 1);
  std::promise<void> modest;
  ASSERT_TRUE(threads.run_for("modest", 500, [&] { modest.set_value(); }));
  std::promise<void> own;
  threads.run([&] { own.set_value(); });
  absent.count_down();
  EXPECT_EQ(modest.get_future().wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(own.get_future().wait_for(long_enough), std::future_status::ready);
  threads.close();
  EXPECT_EQ(greedy, taken);
}

TEST(JoinThreads, WhatEndedLinksHaveLeftToDoDelaysNoConnects) {
  std::latch absent(1);
  std::latch blocked(JoinThreads::most);
  std::latch over(1);
  JoinThreads threads(bounds);
  for (std::size_t i = 0; i < JoinThreads::most; ++i) {
    threads.run_after_end([&] {
      blocked.count_down();
      absent.wait();
    });
  }
  blocked.wait();
  std::atomic<int> ran{0};
  for (int i = 0; i < 100; ++i) {
    threads.run_after_end([&] {
      over.wait();
      ++ran;
    });
  }
  std::promise<void> own;
  threads.run([&] { own.set_value(); });
  std::promise<void> strangers;
  ASSERT_TRUE(threads.run_for("stranger", 500, [&] { strangers.set_value(); }));
  absent.count_down();
  EXPECT_EQ(own.get_future().wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(strangers.get_future().wait_for(long_enough), std::future_status::ready);
  over.count_down();
  threads.close();
  EXPECT_EQ(ran, 100);
}

}  // namespace
}  // namespace kvferry::rdma
