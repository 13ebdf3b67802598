// SPDX-License-Identifier: Apache-2.0
//
// A fence covers what its peer had started on the way to a new connection, too.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <list>
#include <optional>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// "a" writes to "b"; handshakes and data go through relays, each of which can be held up.
class Fence : public ::testing::Test {
 protected:
  Fence() {
    TcpOptions options;
    options.advertised_data_address = data_.address();
    b_.emplace(1, std::move(options));
    data_.set_target(b_->channel->data_port());
    handshakes_.set_target(parse_url(b_->channel->peer_init_url()).port);
    a_.channel->lazy_init_peer_connection("a", "b", handshakes_.address());
  }

  /// Of this value, to the one page that there is. It may take its time.
  [[nodiscard]] std::future<std::size_t> write(std::byte value) {
    auto& object = objects_.emplace_back(page_size, value);
    const std::vector<std::uint64_t> first{0};
    return a_.channel->async_batched_write(std::vector<ConstBuffer>{ConstBuffer(object)},
                                           {.peer_id = "b", .remote_indexes = first, .timeout = long_enough},
                                           asio::use_future);
  }

  static std::error_code outcome(std::future<std::size_t>& operation) {
    EXPECT_EQ(operation.wait_for(2 * long_enough), std::future_status::ready);
    try {
      operation.get();
      return {};
    } catch (const std::system_error& error) {
      return error.code();
    }
  }

  [[nodiscard]] bool page_is(std::byte value) {
    return std::ranges::all_of(b_->page(0), [value](std::byte byte) { return byte == value; });
  }

  /// Connects while fences are made, each of which gives a connection up that takes longer than a second to be made: once more then.
  template <class Connect>
  static std::error_code connected_in_time(Connect connect) {
    const auto deadline = std::chrono::steady_clock::now() + long_enough;
    for (;;) {
      const auto began = std::chrono::steady_clock::now();
      std::error_code error;
      connect(error);
      const auto now = std::chrono::steady_clock::now();
      if (!error || now - began < std::chrono::seconds(1) || now > deadline) {
        return error;
      }
    }
  }

  /// Both sides know of it.
  void cut() {
    data_.cut();
    while (a_.channel->remote_xfer_handler_exists("b") || b_->channel->remote_xfer_handler_exists("a")) {
      std::this_thread::yield();
    }
  }

  Relay handshakes_;
  Relay data_;
  Node a_{1, {}, false};
  std::optional<Node> b_;
  std::list<std::vector<std::byte>> objects_;
};

TEST_F(Fence, WhatWaitedForAConnectionDoesNotLandAfterwards) {
  cut();
  handshakes_.pause();
  auto waits = write(std::byte{1});
  b_->channel->fence("a");  // the peer can't be asked
  handshakes_.resume();
  EXPECT_EQ(outcome(waits), errc::fenced);
  EXPECT_TRUE(page_is(std::byte{0}));
  auto later = write(std::byte{2});
  EXPECT_FALSE(outcome(later)) << "started after it";
  EXPECT_TRUE(page_is(std::byte{2}));
}

TEST_F(Fence, WhatIsStartedAfterwardsWaitsForTheSameConnectionAndIsMade) {
  // It has to be longer than the handshake's answer takes to get there, which may be long on a busy machine.
  std::error_code ended = errc::fenced;
  for (milliseconds afterwards(500); ended == errc::fenced; afterwards *= 5) {
    ASSERT_LT(afterwards, long_enough);
    cut();
    handshakes_.pause();
    auto before = write(std::byte{1});
    b_->channel->fence("a");
    std::error_code error;
    (void)b_->channel->receive_notification(afterwards, error);
    auto after = write(std::byte{2});
    handshakes_.resume();
    EXPECT_EQ(outcome(before), errc::fenced);
    ended = outcome(after);
  }
  EXPECT_FALSE(ended) << ended.message();
  EXPECT_TRUE(page_is(std::byte{2}));
}

TEST_F(Fence, AConnectionThatIsBeingMadeIsWaitedForNoLongerThanASecond) {
  cut();
  data_.pause();
  const int connections = data_.connections();
  auto waits = write(std::byte{1});
  while (data_.connections() == connections) {
    std::this_thread::yield();  // the handshake has been answered
  }
  b_->channel->fence("a");
  data_.resume();
  EXPECT_EQ(outcome(waits), condition::peer_failed);
  EXPECT_TRUE(page_is(std::byte{0})) << "landed over a connection whose handshake knew of no fence";
  auto later = write(std::byte{2});
  EXPECT_FALSE(outcome(later));
}

TEST_F(Fence, AConnectionThatIsMadeMeanwhileIsAskedThen) {
  for (int round = 0; round < 10; ++round) {
    cut();
    auto waits = write(std::byte{1});
    const auto began = std::chrono::steady_clock::now();
    b_->channel->fence("a");
    // A connection that takes longer than a second to be made is given up, see above.
    const bool in_time = std::chrono::steady_clock::now() - began < std::chrono::seconds(1);
    const bool had_landed = page_is(std::byte{1});
    const auto error = outcome(waits);
    EXPECT_TRUE(!error || error == errc::fenced || (!in_time && error == condition::peer_failed)) << error.message();
    EXPECT_EQ(page_is(std::byte{1}), had_landed) << "landed after the fence";
    std::ranges::fill(b_->page(0), std::byte{0});
    a_.channel->lazy_init_peer_connection("a", "b", handshakes_.address());
  }
}

TEST_F(Fence, FencesWithoutPauseLetConnectionsBeMade) {
  std::atomic<bool> done{false};
  std::thread fencing([&] {
    while (!done) {
      b_->channel->fence("a");
    }
  });
  for (int round = 0; round < 10; ++round) {
    cut();
    const auto error = connected_in_time([&](std::error_code& ec) {
      a_.channel->lazy_init_peer_connection("a", "b", handshakes_.address(), {}, {.timeout = long_enough}, ec);
    });
    EXPECT_FALSE(error) << error.message();
  }
  done = true;
  fencing.join();
}

TEST_F(Fence, WhoFencesMayBeTheOneThatConnects) {
  TcpOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  Node writer(1, std::move(options));
  b_->channel->lazy_init_peer_connection("b", "writer", writer.channel->peer_init_url());
  std::atomic<bool> done{false};
  std::thread fencing([&] {
    while (!done) {
      b_->channel->fence("writer");
    }
  });
  for (int round = 0; round < 10; ++round) {
    writer.channel.reset();
    TcpOptions again;
    again.peer_init_url = kvferry::testing::own_loopback_url();
    again.regions = {{writer.memory.data(), writer.memory.size(), page_size}};
    writer.channel.emplace(std::move(again));
    const auto error = connected_in_time([&](std::error_code& ec) {
      b_->channel->lazy_init_peer_connection("b", "writer", writer.channel->peer_init_url(), {},
                                             {.timeout = long_enough}, ec);
    });
    EXPECT_FALSE(error) << error.message();
  }
  done = true;
  fencing.join();
}

TEST_F(Fence, AClosedChannelKeepsNoFenceWaiting) {
  cut();
  data_.pause();
  const int connections = data_.connections();
  auto waits = write(std::byte{1});
  while (data_.connections() == connections) {
    std::this_thread::yield();
  }
  auto fence = b_->channel->async_fence("a", long_enough, asio::use_future);
  b_->channel->close();
  ASSERT_EQ(fence.wait_for(long_enough), std::future_status::ready);
  try {
    fence.get();  // had given the connection up already
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::closed);
  }
  a_.channel->close();
  (void)outcome(waits);
}

}  // namespace
}  // namespace kvferry::tcp::testing
