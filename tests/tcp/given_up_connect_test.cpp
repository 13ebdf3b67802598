// SPDX-License-Identifier: Apache-2.0
// A connect that is given up when the peer has the connection already, and this side hasn't been welcomed yet.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>

#include <chrono>
#include <future>
#include <optional>
#include <string>
#include <system_error>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

class GivenUpConnect : public ::testing::Test {
 protected:
  GivenUpConnect() {
    TcpOptions options;
    options.advertised_data_address = relay_.address();
    b_.emplace(4, options);
    relay_.set_target(b_->channel->data_port());
    relay_.pause_after(1);  // b's welcome
  }

  [[nodiscard]] PeerEvent next_event() {
    std::error_code ec;
    PeerEvent event = b_->channel->wait_peer_event(long_enough, ec);
    EXPECT_FALSE(ec) << ec.message();
    return event;
  }
  void expect_b_to_hear_of_it() {
    const PeerEvent event = next_event();
    EXPECT_EQ(event.kind, PeerEventKind::gone);
    EXPECT_FALSE(a_.channel->remote_xfer_handler_exists("b"));
    EXPECT_FALSE(b_->channel->remote_xfer_handler_exists("a"));
  }
  /// A connect of a's, until the peer has the connection.
  void begin_a_connect() {
    a_.channel->async_lazy_init_peer_connection(
        "a", "b", b_->channel->peer_init_url(), {}, {.timeout = std::chrono::hours(1)},
        asio::bind_cancellation_slot(
            signal_.slot(), [this](std::error_code ec, const std::optional<SideMessage>&) { ended_.set_value(ec); }));
    EXPECT_EQ(next_event().kind, PeerEventKind::connected);
  }
  void cancel_it() {
    signal_.emit(asio::cancellation_type::terminal);
    EXPECT_EQ(ended_.get_future().get(), errc::cancelled);
  }
  void expect_that_a_can_connect() {
    relay_.resume();
    a_.channel->lazy_init_peer_connection("a", "b", b_->channel->peer_init_url());
    const PeerEvent event = next_event();
    EXPECT_EQ(event.kind, PeerEventKind::connected);
    EXPECT_EQ(b_->channel->peers().size(), 1U);
    EXPECT_EQ(a_.channel->batched_write(a_.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  }

  Relay relay_;
  asio::cancellation_signal signal_;
  std::promise<std::error_code> ended_;
  Node a_{4, {}, false};
  std::optional<Node> b_;
};

TEST_F(GivenUpConnect, ThePeerHearsOfACancellationAtOnce) {
  begin_a_connect();
  cancel_it();
  expect_b_to_hear_of_it();
  expect_that_a_can_connect();
}

TEST_F(GivenUpConnect, ThePeerHearsOfADeadlineAtOnce) {
  bool connected = false;
  // On a busy machine b may not have been asked in a short time.
  for (milliseconds timeout(200); !connected; timeout *= 2) {
    ASSERT_LE(timeout, long_enough);
    std::error_code ec;
    (void)a_.channel->lazy_init_peer_connection("a", "b", b_->channel->peer_init_url(), {}, {.timeout = timeout}, ec);
    EXPECT_EQ(ec, errc::timed_out);
    PeerEvent event = b_->channel->wait_peer_event(milliseconds(0), ec);
    connected = !ec && event.kind == PeerEventKind::connected;
  }
  expect_b_to_hear_of_it();
  expect_that_a_can_connect();
}

// An operation of b's under way on that connection ends, too.
TEST_F(GivenUpConnect, WhatThePeerHasStartedOnItEnds) {
  begin_a_connect();
  std::promise<std::error_code> written;
  b_->channel->async_batched_write(b_->pages(1),
                                   {.peer_id = "a", .remote_indexes = indexes(1), .timeout = std::chrono::hours(1)},
                                   [&](std::error_code ec, std::size_t) { written.set_value(ec); });
  cancel_it();
  auto end = written.get_future();
  ASSERT_EQ(end.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(end.get(), condition::peer_failed);
}

}  // namespace
}  // namespace kvferry::tcp::testing
