// SPDX-License-Identifier: Apache-2.0
// Functions for executors and timers that don't keep their object alive, and random bytes.
#include <kvferry/kit/random_bytes.hpp>
#include <kvferry/kit/weak_calls.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>

#include <chrono>
#include <cstddef>
#include <memory>
#include <set>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

struct Counting {
  int calls = 0;
};

TEST(Posted, RunsOnTheExecutorEachTimeWhileTheObjectLives) {
  asio::io_context context;
  auto object = std::make_shared<Counting>();
  const auto call = posted(context.get_executor(), std::weak_ptr(object), [](Counting& self) { ++self.calls; });
  call();
  call();
  EXPECT_EQ(object->calls, 0) << "within the call";
  context.run();
  EXPECT_EQ(object->calls, 2);
}

TEST(Posted, DoesNotKeepTheObject) {
  asio::io_context context;
  auto object = std::make_shared<Counting>();
  bool called = false;
  const auto call = posted(context.get_executor(), std::weak_ptr(object), [&](Counting&) { called = true; });
  call();
  EXPECT_EQ(object.use_count(), 1);
  object.reset();
  call();
  context.run();
  EXPECT_FALSE(called);
}

TEST(WhenExpired, IsCalledUnlessTheTimerIsCancelledOrTheObjectGone) {
  asio::io_context context;
  auto object = std::make_shared<Counting>();
  auto gone = std::make_shared<Counting>();
  bool called = false;
  asio::steady_timer expires(context, std::chrono::milliseconds(0));
  asio::steady_timer cancelled(context, std::chrono::hours(1));
  asio::steady_timer late(context, std::chrono::milliseconds(0));
  const auto count = when_expired(std::weak_ptr(object), [](Counting& self) { ++self.calls; });
  expires.async_wait(count);
  cancelled.async_wait(count);
  late.async_wait(when_expired(std::weak_ptr(gone), [&](Counting&) { called = true; }));
  cancelled.cancel();
  EXPECT_EQ(gone.use_count(), 1);
  gone.reset();
  context.run();
  EXPECT_EQ(object->calls, 1);
  EXPECT_FALSE(called);
}

TEST(RandomBytes, AreAsManyAsAskedForAndNeverTheSame) {
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{16}, std::size_t{24}, std::size_t{33}}) {
    EXPECT_EQ(random_bytes(count).size(), count);
  }
  std::set<Bytes> drawn;
  for (int i = 0; i < 100; ++i) {
    const auto bytes = random_bytes(40);
    drawn.emplace(bytes.begin() + 32, bytes.end());
    drawn.emplace(bytes.begin(), bytes.begin() + 8);
  }
  EXPECT_EQ(drawn.size(), 200U);
}

}  // namespace
}  // namespace kvferry::kit
