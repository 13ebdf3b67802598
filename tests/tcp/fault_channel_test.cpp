// SPDX-License-Identifier: Apache-2.0
#include <kvferry/testing/fault_channel.hpp>

#include <gtest/gtest.h>

#include <asio/any_io_executor.hpp>
#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/execution/outstanding_work.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/require.hpp>
#include <asio/use_future.hpp>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::testing {
namespace {

using namespace std::chrono_literals;
using kvferry_test::long_enough;

/// A channel with faults, and the peer that it writes to.
class FaultChannelTest : public ::testing::Test {
 protected:
  static constexpr std::size_t page_size = 4096;

  FaultChannelTest() { channel_.lazy_init_peer_connection("client", "server", server_.peer_init_url()); }

  TcpOptions options(std::vector<std::byte>& memory, std::string url) {
    TcpOptions options;
    options.regions = {{memory.data(), memory.size(), page_size}};
    options.peer_init_url = std::move(url);
    options.handshake_timeout = 1min;
    return options;
  }

  [[nodiscard]] TransferSpec spec(std::chrono::milliseconds timeout = long_enough) {
    return {.peer_id = "server", .remote_indexes = index_, .timeout = timeout, .statuses = status_, .diagnostic = &why_};
  }
  [[nodiscard]] ConstObjects page() { return {ConstBuffer(mine_.data(), page_size)}; }

  std::error_code write(std::chrono::milliseconds timeout = long_enough) {
    std::error_code ec;
    (void)channel_.batched_write(page(), spec(timeout), ec);
    return ec;
  }

  std::vector<std::byte> theirs_ = std::vector<std::byte>(page_size);
  std::vector<std::byte> mine_ = std::vector<std::byte>(page_size, std::byte{7});
  std::array<std::uint64_t, 1> index_{0};
  std::array<std::error_code, 1> status_;
  std::string why_;
  TcpTransferChannel server_{options(theirs_, kvferry::testing::own_loopback_url())};
  FaultChannel channel_{std::make_unique<TcpTransferChannel>(options(mine_, ""))};
};

TEST_F(FaultChannelTest, DoesWhatTheOtherChannelDoes) {
  EXPECT_EQ(write(), std::error_code());
  EXPECT_EQ(theirs_, mine_);
  EXPECT_EQ(channel_.transfers(), 1U);
}

TEST_F(FaultChannelTest, NoticesABlockingCallInAHandler) {
  channel_.delay(1, 1ms);
  std::promise<std::vector<std::error_code>> promise;
  channel_.async_batched_write(page(), spec(), [&](std::error_code, std::size_t) {
    std::vector<std::error_code> errors(4);
    errors[0] = write();
    channel_.notify("server", ConstBuffer(mine_.data(), 1), {}, errors[1]);
    channel_.fence("server", {}, errors[2]);
    channel_.receive_notification(long_enough, errors[3]);
    promise.set_value(errors);
  });
  EXPECT_EQ(promise.get_future().get(), std::vector<std::error_code>(4, errc::would_deadlock));
  EXPECT_FALSE(write()) << why_;
}

TEST_F(FaultChannelTest, FailsTheChosenTransferAndNoOther) {
  channel_.fail(2, errc::connection_lost);
  EXPECT_EQ(write(), std::error_code());
  theirs_[0] = std::byte{1};
  EXPECT_EQ(write(), errc::connection_lost);
  EXPECT_EQ(status_[0], errc::connection_lost);
  EXPECT_NE(why_.find("a test asked for"), std::string::npos) << why_;
  EXPECT_EQ(theirs_[0], std::byte{1}) << "nothing of it is sent";
  EXPECT_EQ(write(), std::error_code());
  EXPECT_EQ(channel_.faults_left(), 0U);
}

TEST_F(FaultChannelTest, CountsFromTheCallThatAsks) {
  EXPECT_EQ(write(), std::error_code());
  channel_.fail(1, errc::peer_restarted);
  EXPECT_EQ(write(), errc::peer_restarted);
}

TEST_F(FaultChannelTest, DropsUntilTheTimeout) {
  channel_.drop(1);
  EXPECT_EQ(write(50ms), errc::timed_out);
  EXPECT_EQ(status_[0], errc::timed_out);
  EXPECT_EQ(theirs_[0], std::byte{0});
  EXPECT_EQ(write(), std::error_code());
}

TEST_F(FaultChannelTest, DelaysAndThenTransfers) {
  channel_.delay(1, 60ms);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(write(), std::error_code());
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 60ms);
  EXPECT_EQ(theirs_, mine_);
}

TEST_F(FaultChannelTest, ADelayBeyondTheTimeoutTimesOut) {
  channel_.delay(1, 1h);
  EXPECT_EQ(write(50ms), errc::timed_out);
}

TEST_F(FaultChannelTest, WhatItHoldsCanBeCancelled) {
  channel_.drop(1);
  asio::cancellation_signal signal;
  std::promise<std::error_code> ended;
  channel_.async_batched_write(page(), spec(),
                               asio::bind_cancellation_slot(signal.slot(), [&](std::error_code ec, std::size_t count) {
                                 EXPECT_EQ(count, 0U);
                                 ended.set_value(ec);
                               }));
  signal.emit(asio::cancellation_type::terminal);
  EXPECT_EQ(ended.get_future().get(), errc::cancelled);
}

TEST_F(FaultChannelTest, CloseEndsWhatItHolds) {
  channel_.drop(1);
  channel_.delay(2, 1h);
  std::promise<std::error_code> dropped;
  std::promise<std::error_code> delayed;
  channel_.async_batched_write(page(), spec(), [&](std::error_code ec, std::size_t) { dropped.set_value(ec); });
  channel_.async_batched_write(page(), {.peer_id = "server", .remote_indexes = index_, .timeout = 2h},
                               [&](std::error_code ec, std::size_t) { delayed.set_value(ec); });
  channel_.close();
  EXPECT_EQ(dropped.get_future().get(), errc::closed);
  EXPECT_EQ(delayed.get_future().get(), errc::closed);
  channel_.drop(1);
  EXPECT_EQ(write(), errc::closed) << "also what starts after it";
}

TEST_F(FaultChannelTest, CutsTheConnectionAndTheNextTransferReconnects) {
  channel_.cut(1);
  (void)write();  // it may have got through
  EXPECT_EQ(write(), std::error_code());
  EXPECT_EQ(theirs_, mine_);
}

TEST_F(FaultChannelTest, KillsTheChannel) {
  channel_.kill(1);
  (void)write();
  EXPECT_EQ(write(), errc::closed);
}

/// The program's handlers run on a context of its own, perhaps after the channel and its threads are gone.
TEST(FaultChannelThatIsGone, HasLeftNothingInCancellationSlots) {
  asio::io_context programs;
  asio::io_context channels;
  asio::cancellation_signal signal;
  std::error_code ended = errc::timed_out;
  std::unique_ptr<FaultChannel> channel;
  {
    TcpOptions options;
    // Counts as work for as long as anybody has a copy.
    options.executor =
        asio::any_io_executor(asio::require(channels.get_executor(), asio::execution::outstanding_work.tracked));
    channel = std::make_unique<FaultChannel>(std::make_unique<TcpTransferChannel>(std::move(options)));
  }
  std::promise<void> stopped;
  std::thread thread([&] {
    channels.run();
    stopped.set_value();
  });
  channel->async_batched_write(
      ConstObjects(), {.peer_id = "nobody"},
      asio::bind_cancellation_slot(
          signal.slot(),
          asio::bind_executor(programs.get_executor(), [&ended](std::error_code ec, std::size_t) { ended = ec; })));
  asio::post(channels, asio::use_future).get();  // the operation has ended, and its handler is on its way
  channel.reset();
  EXPECT_EQ(stopped.get_future().wait_for(long_enough), std::future_status::ready)
      << "something has the channel's executor still";
  signal.emit(asio::cancellation_type::terminal);
  programs.run();
  thread.join();
  EXPECT_EQ(ended, std::error_code()) << "there was nothing to move";
}

}  // namespace
}  // namespace kvferry::testing
