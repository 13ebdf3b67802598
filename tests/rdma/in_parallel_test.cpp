// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <latch>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/allocation_limit.hpp"
#include "rdma/in_parallel.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

TEST(InParallel, EachNumberHasItsCall) {
  for (const std::size_t threads : {0U, 1U, 2U, 7U, 100U}) {
    for (const std::size_t count : {0U, 1U, 5U, 200U}) {
      std::vector<std::atomic<int>> calls(count);
      in_parallel(threads, count, [&](std::size_t i) { ++calls.at(i); });
      for (const auto& one : calls) {
        EXPECT_EQ(one, 1);
      }
    }
  }
}

TEST(InParallel, OneThreadMakesThemInOrder) {
  std::vector<std::size_t> order;
  in_parallel(1, 5, [&](std::size_t i) { order.push_back(i); });
  EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2, 3, 4}));
}

TEST(InParallel, SoManyThreadsWorkAtATimeAndNoMore) {
  std::latch all_at_work(3);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  in_parallel(3, 50, [&](std::size_t i) {
    {
      const std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    }
    if (i < 3) {
      all_at_work.arrive_and_wait();  // one thread has only one of these
    }
  });
  EXPECT_EQ(threads.size(), 3U);
  EXPECT_TRUE(threads.contains(std::this_thread::get_id()));
}

TEST(InParallel, WhereNoThreadCanBeStartedTheCallingOneDoesItAll) {
  std::vector<std::thread::id> threads;
  threads.reserve(50);
  std::size_t refused_at = 0;
  for (std::size_t allocations = 0; allocations < 100; ++allocations) {
    threads.clear();
    std::mutex mutex;
    test::allocation_refused = false;
    test::allocations_left = allocations;
    in_parallel(3, 50, [&](std::size_t) {
      const std::lock_guard lock(mutex);
      threads.push_back(std::this_thread::get_id());
    });
    test::allocations_left = test::unlimited_allocations;
    EXPECT_EQ(threads.size(), 50U) << allocations;
    if (!test::allocation_refused) {
      break;
    }
    refused_at = allocations + 1;
    if (allocations <= 1) {
      EXPECT_EQ(std::set(threads.begin(), threads.end()), std::set{std::this_thread::get_id()}) << allocations;
    }
  }
  EXPECT_GT(refused_at, 1U) << "else this tests nothing";
  EXPECT_LT(refused_at, 100U);
}

TEST(InParallel, WhatACallThrowsComesOutOnceAllHaveEnded) {
  for (const std::size_t threads : {1U, 4U}) {
    std::atomic<int> running{0};
    std::atomic<int> calls{0};
    EXPECT_THROW(in_parallel(threads, 10'000,
                             [&](std::size_t i) {
                               ++running;
                               ++calls;
                               if (i == 3) {
                                 --running;
                                 throw std::out_of_range("3");
                               }
                               --running;
                             }),
                 std::out_of_range);
    EXPECT_EQ(running, 0);
    EXPECT_GE(calls, 4);
    if (threads == 1) {
      EXPECT_EQ(calls, 4) << "no other one begins";
    }
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
