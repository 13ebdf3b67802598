// SPDX-License-Identifier: Apache-2.0
// A cancellation slot that is emitted while its channel is being destroyed.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <latch>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "test_channel.hpp"

#include <kvferry/kit/gate.hpp>
#include <kvferry/testing/own_loopback.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// Where the thread that cancels is, and where the one that destroys.
struct Meeting {
  std::latch started{1};
  std::latch cancelling{1};
  std::mutex mutex;
  std::condition_variable changed;
  bool destroyed = false;
  std::atomic<bool> left{false};

  /// By the one that cancels: until the channel is gone. It waits for this thread, so not for long.
  void wait_for_the_end() {
    cancelling.count_down();
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::milliseconds(500), [this] { return destroyed; });
    left = true;
  }
  void end() {
    const std::lock_guard lock(mutex);
    destroyed = true;
    changed.notify_all();
  }
};

/// The thread that stops an operation meets the one that destroys the channel.
class MeetingLink final : public tests::KeepingLink {
 public:
  explicit MeetingLink(std::shared_ptr<Meeting> meeting) : meeting_(std::move(meeting)) {}
  void start(std::shared_ptr<Operation> operation) override {
    KeepingLink::start(std::move(operation));
    meeting_->started.count_down();
  }
  void stop(std::shared_ptr<Operation>) override { meeting_->wait_for_the_end(); }

 private:
  const std::shared_ptr<Meeting> meeting_;
};

TEST(Gate, IsLeftByACancellationThatThrows) {
  const auto gate = std::make_shared<Gate>();
  const auto object = std::make_shared<int>(0);
  const auto cancel = cancellation(gate, std::weak_ptr<int>(object), [](int& calls) {
    ++calls;
    throw std::bad_alloc();
  });
  EXPECT_THROW(cancel(asio::cancellation_type::all), std::bad_alloc);
  gate->close();  // waits for whoever is in
  EXPECT_NO_THROW(cancel(asio::cancellation_type::all));
  EXPECT_EQ(*object, 1);
}

TEST(Gate, AChannelIsNotGoneBeforeWhoeverCancelsHasLeft) {
  const auto meeting = std::make_shared<Meeting>();
  std::vector<std::byte> memory(4096);
  ChannelOptions options;
  options.regions = {{memory.data(), memory.size(), memory.size()}};
  options.peer_init_url = kvferry::testing::own_loopback_url();
  const auto make_link = [meeting](const auto&) { return std::make_shared<MeetingLink>(meeting); };
  tests::TestChannel b(options, make_link);
  options.peer_init_url.clear();
  auto a = std::make_unique<tests::TestChannel>(options, make_link);
  a->lazy_init_peer_connection("a", "b", b.peer_init_url());

  // Slots are emitted where their handlers run: on the user's executor.
  asio::io_context users;
  asio::cancellation_signal signal;
  const std::vector<std::uint64_t> page{0};
  std::error_code ended;
  a->async_batched_write({ConstBuffer(memory.data(), memory.size())}, {.peer_id = "b", .remote_indexes = page},
                         asio::bind_executor(users, asio::bind_cancellation_slot(
                                                        signal.slot(), [&](std::error_code ec, std::size_t) { ended = ec; })));
  meeting->started.wait();  // else the link has no part in the cancellation
  std::thread user([&] {
    asio::post(users, [&] { signal.emit(asio::cancellation_type::all); });
    users.run();
  });
  meeting->cancelling.wait();
  a.reset();
  EXPECT_TRUE(meeting->left) << "the user's thread may hold the last timer of a context that is gone";
  meeting->end();
  user.join();
  EXPECT_EQ(ended, errc::closed);
}

}  // namespace
}  // namespace kvferry::kit
