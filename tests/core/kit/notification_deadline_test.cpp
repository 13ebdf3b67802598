// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/notification_queue.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <atomic>
#include <barrier>
#include <chrono>
#include <memory>
#include <thread>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

// A notification may come while the call that waits for it is still entering its deadline.
TEST(NotificationQueue, AWaitThatHasEndedLeavesNoDeadlineBehind) {
  constexpr int rounds = 20000;
  asio::io_context context;
  const auto deadlines = std::make_shared<DeadlineQueue>(context.get_executor());
  const auto queue = std::make_shared<NotificationQueue>(deadlines, NotificationQueue::Bounds{4, 4096, 4096});
  std::barrier turn(2);
  std::thread peer([&] {
    for (int round = 0; round < rounds; ++round) {
      turn.arrive_and_wait();
      EXPECT_TRUE(queue->push({}));
      turn.arrive_and_wait();
    }
  });
  int left_behind = 0;
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ended{0};
    turn.arrive_and_wait();
    queue->receive(std::chrono::hours(1),
                   NotificationCompletion::direct([&](std::error_code ec, const Notification&) { ended += ec ? 0 : 1; }));
    turn.arrive_and_wait();
    EXPECT_EQ(ended, 1);
    left_behind += deadlines->size() == 0 ? 0 : 1;
    while (deadlines->size() != 0) {
      deadlines->close();
    }
  }
  peer.join();
  EXPECT_EQ(left_behind, 0);
  EXPECT_EQ(deadlines->size(), 0U);
}

}  // namespace
}  // namespace kvferry::kit
