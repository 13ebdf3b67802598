// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <sys/resource.h>
#include <unistd.h>

#include <asio/post.hpp>

#include <chrono>
#include <future>
#include <latch>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using testing::indexes;
using testing::Node;

struct Policy {
  std::string name;
  PollPolicy poll;
};

/// Blocking calls, in which the caller's thread waits for the connection itself.
class BlockingCalls : public ::testing::TestWithParam<Policy> {
 protected:
  BlockingCalls() { a_.channel->lazy_init_peer_connection("a", "b", b_.channel->peer_init_url()); }

  [[nodiscard]] static TcpOptions options() {
    TcpOptions options;
    options.poll = GetParam().poll;
    return options;
  }

  Node a_{256, options()};
  Node b_{256, options()};
};

INSTANTIATE_TEST_SUITE_P(Poll, BlockingCalls,
                         ::testing::Values(Policy{"Never", PollPolicy::never()}, Policy{"Default", PollPolicy()},
                                           Policy{"Always", PollPolicy::always()}),
                         [](const auto& policy) { return policy.param.name; });

TEST_P(BlockingCalls, MoveWhatTheyWaitFor) {
  const auto all = indexes(256);
  for (unsigned round = 1; round <= 20; ++round) {
    a_.fill(round);
    EXPECT_EQ(a_.channel->batched_write(a_.pages(256), {.peer_id = "b", .remote_indexes = all}), 256U);
    EXPECT_EQ(a_.memory, b_.memory);
    b_.fill(round + 1000);
    EXPECT_EQ(a_.channel->batched_read(a_.pages(256), {.peer_id = "b", .remote_indexes = all}), 256U);
    EXPECT_EQ(a_.memory, b_.memory);
  }
}

TEST_P(BlockingCalls, OfBothSidesMeet) {
  std::thread other([&] {
    for (unsigned round = 1; round <= 50; ++round) {
      EXPECT_EQ(b_.channel->batched_recv(b_.pages(16), {.peer_id = "a", .tag = round}), 16U);
      EXPECT_EQ(b_.channel->batched_send(b_.pages(16), {.peer_id = "a", .tag = round}), 16U);
    }
  });
  for (unsigned round = 1; round <= 50; ++round) {
    EXPECT_EQ(a_.channel->batched_send(a_.pages(16), {.peer_id = "b", .tag = round}), 16U);
    EXPECT_EQ(a_.channel->batched_recv(a_.pages(16), {.peer_id = "b", .tag = round}), 16U);
  }
  other.join();
}

TEST_P(BlockingCalls, OfSeveralThreadsShareAConnection) {
  std::vector<std::thread> threads;
  for (std::size_t thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      const std::vector<std::uint64_t> page{thread};
      for (int round = 0; round < 100; ++round) {
        EXPECT_EQ(a_.channel->batched_write(std::vector{a_.page(thread)}, {.peer_id = "b", .remote_indexes = page}), 1U);
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

TEST_P(BlockingCalls, EndWithTheirDeadline) {
  std::error_code error;
  EXPECT_EQ(a_.channel->batched_recv(a_.pages(1), {.peer_id = "b", .tag = 1, .timeout = std::chrono::milliseconds(20)}, error),
            0U);
  EXPECT_EQ(error, errc::timed_out);
}

TEST_P(BlockingCalls, EndWithTheirChannel) {
  std::latch started(1);
  auto blocked = std::async(std::launch::async, [&] {
    std::error_code error;
    started.count_down();
    a_.channel->batched_recv(a_.pages(1), {.peer_id = "b", .tag = 1}, error);
    return error;
  });
  started.wait();
  a_.channel->close();
  EXPECT_EQ(blocked.get(), errc::closed);
}

TEST_P(BlockingCalls, LeaveTheConnectionToThosePeersStartAfterManyInARow) {
  for (unsigned round = 1; round <= 5; ++round) {
    for (int call = 0; call < 400; ++call) {
      ASSERT_EQ(a_.channel->batched_write(std::vector{a_.page(0)}, {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
    }
    b_.fill(round);
    ASSERT_EQ(b_.channel->batched_write(b_.pages(256), {.peer_id = "a", .remote_indexes = indexes(256)}), 256U);
    ASSERT_EQ(a_.memory, b_.memory);
  }
}

TEST_P(BlockingCalls, LeaveTheConnectionToThosePeersStart) {
  EXPECT_EQ(a_.channel->batched_write(std::vector{a_.page(0)}, {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
  // Nobody at "a" waits for anything now.
  b_.fill(7);
  EXPECT_EQ(b_.channel->batched_write(b_.pages(256), {.peer_id = "a", .remote_indexes = indexes(256)}), 256U);
  EXPECT_EQ(a_.memory, b_.memory);
}

#ifndef __SANITIZE_ADDRESS__  // UBSan, which comes with it, takes descriptors for its own checks
/// Keeps the process from opening anything more.
class NoDescriptorsLeft {
 public:
  NoDescriptorsLeft() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const int lowest_free = ::dup(0);
    ::close(lowest_free);
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(lowest_free);
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  NoDescriptorsLeft(const NoDescriptorsLeft&) = delete;
  NoDescriptorsLeft& operator=(const NoDescriptorsLeft&) = delete;
  ~NoDescriptorsLeft() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

TEST_P(BlockingCalls, WaitWithoutADescriptorOfTheirOwn) {
  b_.fill(3);
  auto outcome = std::async(std::launch::async, [&] {
    const NoDescriptorsLeft none;
    std::error_code error;
    // Long enough for the call to want to sleep.
    a_.channel->batched_recv(a_.pages(1), {.peer_id = "b", .tag = 1, .timeout = std::chrono::milliseconds(200)}, error);
    EXPECT_EQ(error, errc::timed_out);
    return a_.channel->batched_read(a_.pages(256), {.peer_id = "b", .remote_indexes = indexes(256)}, error);
  });
  EXPECT_EQ(outcome.get(), 256U);
  EXPECT_EQ(a_.memory, b_.memory);
  // Nobody holds the connection: what its peer starts gets through.
  b_.fill(4);
  EXPECT_EQ(b_.channel->batched_write(b_.pages(256), {.peer_id = "a", .remote_indexes = indexes(256)}), 256U);
  EXPECT_EQ(a_.memory, b_.memory);
}
#endif

TEST(HandlersLeft, MayCallTheChannelThatIsBeingDestroyed) {
  Node b(1);
  Node a(1);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  std::promise<std::error_code> second;
  std::latch held(1);
  TcpTransferChannel& channel = *a.channel;
  channel.async_batched_recv(a.pages(1), {.peer_id = "b"}, [&](std::error_code first, std::size_t) {
    EXPECT_EQ(first, errc::closed);
    channel.async_batched_recv(a.pages(1), {.peer_id = "b"},
                               [&](std::error_code ec, std::size_t) { second.set_value(ec); });
  });
  // The I/O thread gets to the handler when the channel has been closed, and its destructor waits for it.
  asio::post(channel.get_executor(), [&] {
    held.count_down();
    while (channel.remote_xfer_handler_exists("b")) {
      std::this_thread::yield();
    }
  });
  held.wait();
  a.channel.reset();
  EXPECT_EQ(second.get_future().get(), errc::closed);
}

}  // namespace
}  // namespace kvferry::tcp
