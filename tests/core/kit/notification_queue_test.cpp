// SPDX-License-Identifier: Apache-2.0
#include "core/kit/notification_queue.hpp"

#include <gtest/gtest.h>
#include <asio/io_context.hpp>

#include <memory>
#include <string>
#include <vector>

namespace kvferry::kit {
namespace {

class NotificationQueueTest : public testing::Test {
 protected:
  bool push(const std::string& peer, std::size_t bytes) {
    Notification notification;
    notification.peer_id = peer;
    notification.payload.resize(bytes);
    return queue_->push(std::move(notification));
  }
  std::size_t fill(const std::string& peer, std::size_t bytes) {
    std::size_t count = 0;
    while (count < 1'000'000 && push(peer, bytes)) {
      ++count;
    }
    return count;
  }
  void take() {
    queue_->receive({}, NotificationCompletion::direct([](std::error_code ec, Notification) { EXPECT_FALSE(ec); }));
  }

  asio::io_context io_;
  std::shared_ptr<NotificationQueue> queue_ = std::make_shared<NotificationQueue>(
      std::make_shared<DeadlineQueue>(io_.get_executor()), NotificationQueue::Bounds{1000, 1 << 20, 1 << 19});
};

TEST_F(NotificationQueueTest, APeerHasItsShareOfTheBytes) {
  EXPECT_EQ(fill("a", 60'000), 8U);
  EXPECT_EQ(fill("b", 60'000), 8U);
  EXPECT_EQ(fill("a", 60'000), 0U);
  take();
  EXPECT_TRUE(push("a", 60'000));
}

TEST_F(NotificationQueueTest, WhoeverHasSentFewFindsRoomAmongMany) {
  EXPECT_EQ(fill("a", 1), 1000U);
  EXPECT_FALSE(push("a", 1));
  EXPECT_EQ(fill("b", 1), 16U);
  EXPECT_EQ(fill("c", 60'000), 2U);
}

}  // namespace
}  // namespace kvferry::kit
