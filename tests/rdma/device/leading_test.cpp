// SPDX-License-Identifier: Apache-2.0
// The thread of a blocking call drives its connection itself.
#include <gtest/gtest.h>

#include <asio/any_io_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// What a channel has in the place of I/O threads, at work or not as the test wants.
class Executor {
 public:
  Executor() { begin(); }
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;
  ~Executor() { end(); }
  void begin() {
    context_.restart();
    thread_ = std::thread([this] { context_.run(); });
  }
  void end() {
    context_.stop();
    if (thread_.joinable()) {
      thread_.join();
    }
  }
  [[nodiscard]] asio::any_io_executor get() { return context_.get_executor(); }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  std::thread thread_;
};

/// Makes a call while the executor stands still. @return whether it came back all the same.
bool ends_alone(Executor& executor, const std::function<void()>& call) {
  executor.end();
  auto done = std::async(std::launch::async, call);
  const bool ended = done.wait_for(long_enough) == std::future_status::ready;
  executor.begin();
  done.get();
  return ended;
}

class Leading : public ::testing::TestWithParam<bool> {
 protected:
  static constexpr std::size_t count = 1000;

  Leading() {
    NodeOptions options;
    options.channel.executor = executor_.get();
    options.channel.poll = GetParam() ? PollPolicy::never() : PollPolicy::always();
    node = std::make_unique<Node>(count, std::move(options));
    peer = std::make_unique<Node>(count);
    node->connect("node", "peer", *peer);
    // What follows a connect is done when a call has ended.
    node->channel->batched_write(node->pages(1), {.peer_id = "peer", .remote_indexes = indexes(1)});
    reversed_ = indexes(count);
    std::ranges::reverse(reversed_);  // so that each page takes a request, and there are many lists
  }
  ~Leading() override { node->channel->close(); }

  Executor executor_;
  std::unique_ptr<Node> node;
  std::unique_ptr<Node> peer;
  std::vector<std::uint64_t> reversed_;
};

TEST_P(Leading, ABlockingCallNeedsNoOtherThread) {
  node->fill(1);
  std::size_t moved = 0;
  EXPECT_TRUE(ends_alone(executor_, [&] {
    for (int i = 0; i < 3; ++i) {
      moved += node->channel->batched_write(node->pages(count), {.peer_id = "peer", .remote_indexes = reversed_});
    }
  }));
  EXPECT_EQ(moved, 3 * count);
  peer->fill(2);
  EXPECT_TRUE(ends_alone(executor_, [&] {
    moved = node->channel->batched_read(node->pages(count), {.peer_id = "peer", .remote_indexes = indexes(count)});
  }));
  EXPECT_EQ(moved, count);
  EXPECT_TRUE(same(*node, *peer));
}

TEST_P(Leading, ABlockingCallOverTheFirstOfSeveralQueuePairsNeedsNoOtherThread) {
  NodeOptions options;
  options.channel.executor = executor_.get();
  options.channel.poll = GetParam() ? PollPolicy::never() : PollPolicy::always();
  options.channel.queue_pairs_per_rail = 3;
  options.channel.queue_pair_threshold = 64 * page_size;
  Node several(count, std::move(options));
  NodeOptions of_target;
  of_target.channel.queue_pairs_per_rail = 3;
  Node target(count, std::move(of_target));
  several.connect("several", "target", target);
  several.channel->batched_write(several.pages(1), {.peer_id = "target", .remote_indexes = indexes(1)});
  several.fill(4);
  std::size_t moved = 0;
  EXPECT_TRUE(ends_alone(executor_, [&] {
    for (std::size_t i = 0; i < 63; ++i) {
      moved += several.channel->batched_write(several.pages(10, i * 10),
                                              {.peer_id = "target", .remote_indexes = indexes(10, i * 10)});
    }
  }));
  EXPECT_EQ(moved, 630U);
  // Over all of them others help.
  EXPECT_EQ(several.channel->batched_write(several.pages(count), {.peer_id = "target", .remote_indexes = reversed_}),
            count);
  EXPECT_EQ(
      several.channel->batched_write(several.pages(count), {.peer_id = "target", .remote_indexes = indexes(count)}),
      count);
  EXPECT_TRUE(same(several, target));
  several.channel->close();
}

TEST_P(Leading, WhatAPeerAnswersIsTakenToo) {
  const std::vector<std::byte> notification(100, std::byte{7});
  EXPECT_TRUE(ends_alone(executor_, [&] {
    for (int i = 0; i < 100; ++i) {
      node->channel->notify("peer", notification);
    }
  }));
  peer->fill(3);
  std::thread sender([&] { peer->channel->batched_send(peer->pages(count), {.peer_id = "node", .tag = 5}); });
  EXPECT_TRUE(
      ends_alone(executor_, [&] { node->channel->batched_recv(node->pages(count), {.peer_id = "peer", .tag = 5}); }));
  sender.join();
  EXPECT_TRUE(same(*node, *peer));
}

TEST_P(Leading, AfterACallTheExecutorHasTheConnectionAgain) {
  for (int i = 0; i < 50; ++i) {
    node->channel->batched_write(node->pages(1), {.peer_id = "peer", .remote_indexes = indexes(1)});
    peer->channel->notify("node", std::vector<std::byte>(8));
    EXPECT_EQ(node->channel->receive_notification(long_enough).payload.size(), 8U);
  }
}

TEST_P(Leading, ALeaderIsToldOfDeadlinesAndOfTheEndByOthers) {
  std::error_code ec;
  (void)node->channel->batched_recv(node->pages(1),
                                    {.peer_id = "peer", .tag = 1, .timeout = std::chrono::milliseconds(50)}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  for (const bool closes : {false, true}) {
    auto waiting = std::async(std::launch::async, [&] {
      std::error_code cause;
      (void)node->channel->batched_recv(node->pages(1), {.peer_id = "peer", .tag = 2}, cause);
      return cause;
    });
    // Many calls at the same time, of which one leads.
    std::vector<std::future<std::size_t>> others;
    for (std::size_t i = 1; i < 5; ++i) {
      others.push_back(std::async(std::launch::async, [&, i] {
        std::size_t written = 0;
        for (int round = 0; round < 20; ++round) {
          written += node->channel->batched_write(node->pages(20, 20 * i),
                                                  {.peer_id = "peer", .remote_indexes = indexes(20, 20 * i)});
        }
        return written;
      }));
    }
    for (auto& other : others) {
      EXPECT_EQ(other.get(), 400U);
    }
    if (closes) {
      node->channel->close();
    } else {
      node->channel->disconnect("peer");
    }
    ASSERT_EQ(waiting.wait_for(long_enough), std::future_status::ready);
    EXPECT_TRUE(waiting.get());
    if (!closes) {
      node->connect("node", "peer", *peer);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, Leading, ::testing::Bool(),
                         [](const auto& policy) { return policy.param ? "NeverPolls" : "AlwaysPolls"; });

}  // namespace
}  // namespace kvferry::rdma::testing
