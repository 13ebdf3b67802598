// SPDX-License-Identifier: Apache-2.0
#include "rdma/join_threads.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <latch>
#include <thread>

namespace kvferry::rdma {
namespace {

constexpr std::chrono::seconds long_enough{60};

TEST(JoinThreads, OneThatTakesItsTimeDelaysNoOther) {
  JoinThreads threads;
  std::latch absent(1);
  std::latch blocked(JoinThreads::most - 1);
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
  JoinThreads threads;
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

}  // namespace
}  // namespace kvferry::rdma
