// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/notification_queue.hpp>

#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

class NotificationQueueTest : public ::testing::Test {
 protected:
  bool push(const std::string& peer, std::size_t bytes, std::uint64_t key = 0) {
    Notification notification;
    notification.peer_id = peer;
    notification.key = key;
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
  std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(io_.get_executor());
  std::shared_ptr<NotificationQueue> queue_ =
      std::make_shared<NotificationQueue>(deadlines_, NotificationQueue::Bounds{1000, 1 << 20, 1 << 19});
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

TEST_F(NotificationQueueTest, APeerHasItsShareOfTheCount) {
  queue_ = std::make_shared<NotificationQueue>(deadlines_, NotificationQueue::Bounds{1000, 1 << 20, 1 << 19, 250});
  EXPECT_EQ(fill("a", 1), 250U);
  EXPECT_EQ(fill("b", 1), 250U) << "what others have is no matter of its";
  take();
  EXPECT_TRUE(push("a", 1));
}

TEST_F(NotificationQueueTest, AKeyCostsWhatItsBoxTakes) {
  std::uint64_t count = 0;
  while (count < 1000 && push("a", 1, count + 1)) {
    ++count;
  }
  EXPECT_EQ(count, (1U << 19) / (1 + 1 + 768));
}

TEST_F(NotificationQueueTest, WhatNobodyAsksForIsDroppedWithItsPeer) {
  std::size_t gathered = 0;
  queue_->receive({3, 2, {}}, NotificationsCompletion::direct([&](std::error_code ec, std::vector<Notification> came) {
                    EXPECT_FALSE(ec);
                    gathered = came.size();
                  }));
  for (const std::uint64_t key : std::vector<std::uint64_t>{0, 1, 1, 2, 3}) {
    ASSERT_TRUE(push("a", 1, key));
  }
  ASSERT_TRUE(push("b", 60'000, 1));
  EXPECT_EQ(queue_->drop_unasked("a"), 3U) << "not the one without a key, nor the one that a call waits for";
  EXPECT_EQ(queue_->pending(), 3U);
  EXPECT_EQ(queue_->drop_unasked("a"), 0U);
  ASSERT_TRUE(push("a", 1, 3));
  EXPECT_EQ(gathered, 2U);
  take();
  queue_->receive({1, 1, {}}, NotificationsCompletion::direct([](std::error_code, std::vector<Notification> came) {
                    ASSERT_EQ(came.size(), 1U);
                    EXPECT_EQ(came[0].peer_id, "b");
                  }));
  EXPECT_EQ(queue_->pending(), 0U);
  EXPECT_EQ(fill("a", 60'000), 8U) << "its share is free";
}

TEST_F(NotificationQueueTest, WithoutMemoryNoCallAndNoNotificationIsLost) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    ASSERT_EQ(queue_->pending(), 0U);
    std::size_t begun = 0;
    std::size_t ended = 0;
    std::size_t came = 0;
    const auto wait = [&](std::size_t wanted, std::optional<std::chrono::milliseconds> timeout) {
      try {
        queue_->receive({0, wanted, timeout},
                        NotificationsCompletion::direct([&](std::error_code, const std::vector<Notification>& all) {
                          ++ended;
                          came += all.size();
                        }));
        ++begun;
      } catch (const std::bad_alloc&) {
        // The caller knows that it hasn't begun.
      }
    };
    Notification first;
    first.peer_id = "a peer of a name that is too long for a string's own buffer";
    std::size_t pushed = 0;
    test::allocation_refused = false;
    test::allocations_left = allocations;
    wait(3, std::chrono::milliseconds(0));
    wait(1, std::nullopt);
    wait(1, std::chrono::hours(1));
    test::allocations_left = test::unlimited_allocations;
    wait(2, std::nullopt);
    pushed += std::size_t{queue_->push(first)};
    pushed += std::size_t{queue_->push(first)};
    // The first one's time is over.
    test::allocations_left = allocations;
    const auto until = Clock::now() + std::chrono::milliseconds(10);
    while (ended == 0 && Clock::now() < until) {
      io_.restart();
      (void)io_.run_one_for(std::chrono::milliseconds(1));
    }
    try {
      pushed += std::size_t{queue_->push(first)};
    } catch (const std::bad_alloc&) {
      // Its owner knows that it hasn't gone.
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    for (int i = 0; ended < begun && i < 200; ++i) {
      io_.restart();
      (void)io_.run_one_for(std::chrono::milliseconds(5));
      if (i > 50) {
        pushed += std::size_t{queue_->push(first)};  // what the others want
      }
    }
    EXPECT_EQ(ended, begun) << allocations;
    EXPECT_EQ(came + queue_->pending(), pushed) << allocations;
    while (queue_->pending() != 0) {
      take();
    }
  }
}

TEST_F(NotificationQueueTest, ClosedItEndsAllCallsWithoutMemory) {
  int ended = 0;
  for (int i = 0; i < 3; ++i) {
    queue_->receive({}, NotificationCompletion::direct([&](std::error_code ec, const Notification&) {
                      EXPECT_EQ(ec, errc::closed);
                      ++ended;
                    }));
  }
  test::allocations_left = 0;
  EXPECT_NO_THROW(queue_->close());
  test::allocations_left = test::unlimited_allocations;
  EXPECT_EQ(ended, 3);
}

TEST_F(NotificationQueueTest, AWaitEndsWithItsDeadlineOrLeavesNoneBehind) {
  std::vector<std::error_code> ended;
  const auto wait = [&](std::chrono::milliseconds timeout) {
    queue_->receive(timeout, NotificationCompletion::direct([&](std::error_code ec, const Notification&) {
                      ended.push_back(ec);
                    }));
  };
  wait(std::chrono::hours(1));
  EXPECT_EQ(deadlines_->size(), 1U);
  EXPECT_TRUE(push("a", 1));
  EXPECT_EQ(deadlines_->size(), 0U);
  EXPECT_EQ(ended, std::vector{std::error_code()});
  EXPECT_EQ(queue_->pending(), 0U);

  wait(std::chrono::milliseconds(1));
  while (ended.size() == 1 && io_.run_one() != 0) {
  }
  EXPECT_EQ(ended.back(), errc::timed_out);
  EXPECT_TRUE(push("a", 1)) << "nobody waits any more";
  EXPECT_EQ(queue_->pending(), 1U);
  take();

  asio::cancellation_signal signal;
  queue_->receive(std::chrono::hours(1),
                  NotificationCompletion(asio::bind_cancellation_slot(signal.slot(),
                                                                      [&](std::error_code ec, const Notification&) {
                                                                        ended.push_back(ec);
                                                                      }),
                                         io_.get_executor()));
  signal.emit(asio::cancellation_type::all);
  EXPECT_EQ(deadlines_->size(), 0U);
  io_.restart();
  io_.poll();
  EXPECT_EQ(ended.back(), errc::cancelled);

  wait(std::chrono::hours(1));
  queue_->close();
  EXPECT_EQ(ended.back(), errc::closed);
  EXPECT_EQ(ended.size(), 4U);
}

}  // namespace
}  // namespace kvferry::kit
