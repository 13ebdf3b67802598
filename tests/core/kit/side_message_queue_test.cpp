// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/side_message_queue.hpp>

#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

constexpr std::size_t size = 1000;
constexpr std::size_t cost = size + SideMessageQueue::overhead;

class SideMessageQueueTest : public ::testing::Test {
 protected:
  bool push(const std::string& source) {
    std::function<void()> answer = [this, source] { order_ += source; };
    const bool taken = queue_.push(source, size, answer);
    EXPECT_EQ(taken, !answer) << "what isn't taken stays the caller's";
    return taken;
  }

  SideMessageQueue queue_{{8 * cost, 5 * cost}};
  std::string order_;
};

TEST_F(SideMessageQueueTest, SourcesTakeTurns) {
  for (const char* source : {"a", "a", "a", "b", "c", "b"}) {
    EXPECT_TRUE(push(source));
  }
  while (const auto answer = queue_.pop()) {
    answer();
  }
  EXPECT_EQ(order_, "abcaba");
}

TEST_F(SideMessageQueueTest, ASourceHasItsShareAndNoMore) {
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(push("a"));
  }
  EXPECT_FALSE(push("a"));
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(push("b"));
  }
  EXPECT_FALSE(push("c")) << "all are full";
  EXPECT_TRUE(queue_.pop());
  EXPECT_TRUE(push("c"));
}

}  // namespace
}  // namespace kvferry::kit
