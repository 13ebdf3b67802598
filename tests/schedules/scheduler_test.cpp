// SPDX-License-Identifier: Apache-2.0
#include "scheduler.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::schedules {
namespace {

/// Three threads that each note when they come by. @return the order in which they did.
std::vector<int> order_of(std::uint64_t seed, Outcome* outcome = nullptr) {
  std::vector<int> order;
  const Outcome of_round = Scheduler(seed, {}).run([&] {
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int number = 0; number < 3; ++number) {
      threads.emplace_back([&, number] {
        const std::lock_guard lock(mutex);
        order.push_back(number);
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  });
  if (outcome != nullptr) {
    *outcome = of_round;
  }
  return order;
}

TEST(Scheduler, FindsEveryOrderAndEachAgainByItsSeed) {
  std::set<std::vector<int>> orders;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    Outcome once;
    Outcome again;
    const auto order = order_of(seed, &once);
    EXPECT_EQ(order, order_of(seed, &again));
    EXPECT_EQ(once.steps, again.steps);
    EXPECT_EQ(once.trace, again.trace);
    EXPECT_EQ(once.passed, again.passed);
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 6U);
}

TEST(Scheduler, TimePassesWhileAllWait) {
  const auto before = std::chrono::steady_clock::now();
  const Outcome outcome = Scheduler(1, {}).run([] {
    std::mutex mutex;
    std::condition_variable never;
    std::unique_lock lock(mutex);
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(never.wait_for(lock, std::chrono::hours(2)), std::cv_status::timeout);
    EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::hours(2));
  });
  EXPECT_GE(outcome.passed, std::chrono::hours(2));
  EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::hours(1));
}

TEST(Scheduler, ANotificationThatComesBetweenALookAndAWaitIsMissedInSomeRounds) {
  int missed = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    Scheduler(seed, {}).run([&] {
      std::mutex mutex;
      std::condition_variable changed;
      bool done = false;
      std::thread other([&] {
        {
          const std::lock_guard lock(mutex);
          done = true;
        }
        changed.notify_all();
      });
      std::unique_lock lock(mutex);
      const bool seen = done;
      lock.unlock();  // the fault
      lock.lock();
      if (!seen) {
        missed += changed.wait_for(lock, std::chrono::hours(1)) == std::cv_status::timeout ? 1 : 0;
      }
      lock.unlock();
      other.join();
    });
  }
  EXPECT_GT(missed, 0);
  EXPECT_LT(missed, 100);
}

TEST(SchedulerDeathTest, SaysWhatThreadsWaitForThatWaitForEachOther) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(explore(100,
                      [] {
                        std::mutex first;
                        std::mutex second;
                        std::thread other([&] {
                          const std::lock_guard lock(second);
                          const std::lock_guard then(first);
                        });
                        {
                          const std::lock_guard lock(first);
                          const std::lock_guard then(second);
                        }
                        other.join();
                      }),
              ::testing::ExitedWithCode(1), "each waits for another. KVFERRY_SCHEDULE_SEED=[0-9]+, step");
}

}  // namespace
}  // namespace kvferry::schedules
