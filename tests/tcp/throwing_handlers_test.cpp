// SPDX-License-Identifier: Apache-2.0
// User's code that throws, at every place where it can run.
#include <gtest/gtest.h>

#include <asio/bind_executor.hpp>
#include <asio/io_context.hpp>

#include <cerrno>
#include <future>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "channel_pair.hpp"
#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

struct Trouble : std::runtime_error {
  Trouble() : std::runtime_error("a handler's own trouble") {}
};

class ThrowingHandlers : public ::testing::TestWithParam<PollPolicy> {
 protected:
  [[nodiscard]] static TcpOptions options() {
    TcpOptions made;
    made.poll = GetParam();
    made.log_sink = [](const LogRecord&) { throw Trouble(); };  // a sink may throw as well
    return made;
  }

  /// Both channels' threads are there and do their work.
  void expect_alive() {
    EXPECT_EQ(a.channel->async_batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}, asio::use_future).get(), 4U);
    EXPECT_EQ(b.channel->async_batched_write(b.pages(4), {.peer_id = "a", .remote_indexes = indexes(4)}, asio::use_future).get(), 4U);
  }

  Node a{4, options()};
  Node b{4, options()};
};

INSTANTIATE_TEST_SUITE_P(Poll, ThrowingHandlers,
                         ::testing::Values(PollPolicy::never(), PollPolicy(), PollPolicy::always()));

TEST_P(ThrowingHandlers, OnTheChannelsOwnThreadsStrandNothing) {
  for (int i = 0; i < 3; ++i) {
    a.channel->async_lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {},
                                               [](std::error_code, const std::optional<SideMessage>&) { throw Trouble(); });
    a.channel->async_send_init_side_msg(b.channel->peer_init_url(), encode_side_message(P2PInitSideMsg{}), {},
                                        [](std::error_code, const std::optional<SideMessage>&) { throw 17; });
    b.channel->async_receive_notification(std::nullopt, [](std::error_code, const Notification&) { throw Trouble(); });
    b.channel->async_receive_notification(std::chrono::milliseconds(1), [](std::error_code, const Notification&) { throw 1; });
  }
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  const std::vector<std::byte> note(3);
  for (int i = 0; i < 20; ++i) {
    const auto throws = [](std::error_code, std::size_t) { throw Trouble(); };
    a.channel->async_batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4), .notification = note}, throws);
    a.channel->async_batched_read(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}, throws);
    a.channel->async_batched_recv(a.pages(1), {.peer_id = "b", .tag = 1, .timeout = std::chrono::milliseconds(1)}, throws);
    a.channel->async_batched_write(a.pages(1), {.peer_id = "nobody", .remote_indexes = indexes(1)}, throws);
  }
  expect_alive();
  a.channel->async_batched_recv(a.pages(1), {.peer_id = "b", .tag = 2}, [](std::error_code, std::size_t) { throw Trouble(); });
  a.channel.reset();  // which ends the recv
}

TEST_P(ThrowingHandlers, OnTheUsersExecutorComeOutOfItsRun) {
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  asio::io_context context;
  a.channel->async_batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)},
                                 asio::bind_executor(context, [](std::error_code, std::size_t) { throw Trouble(); }));
  EXPECT_THROW(context.run(), Trouble);
  expect_alive();
}

/// Answers side messages by throwing what is no exception.
class ThrowingChannel final : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;
  SideMessage handle_init_side_msg(const SideMessage&) override { throw 17; }
};

/// Answers side messages by throwing a code whose number means nothing to the peer.
class ExhaustedChannel final : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;
  SideMessage handle_init_side_msg(const SideMessage&) override {
    throw std::system_error(ENOMEM, std::generic_category(), "no pages");
  }
};

TEST(ThrowingSideMessageHandlers, SayWhetherToAskAgain) {
  TcpOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  ExhaustedChannel b(options);
  TcpTransferChannel a{kvferry_test::patient(TcpOptions())};
  std::error_code ec;
  std::string why;
  a.send_init_side_msg(b.peer_init_url(), encode_side_message(P2PInitSideMsg{}), {.diagnostic = &why}, ec);
  EXPECT_EQ(ec, errc::resource_limit);
  EXPECT_EQ(ec, condition::retryable);
  EXPECT_NE(why.find("no pages"), std::string::npos) << why;
}

TEST(ThrowingSideMessageHandlers, AnswerWithAnError) {
  TcpOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  ThrowingChannel b(options);
  TcpTransferChannel a{kvferry_test::patient(TcpOptions())};
  for (int i = 0; i < 3; ++i) {
    std::error_code ec;
    a.send_init_side_msg(b.peer_init_url(), encode_side_message(P2PInitSideMsg{}), {}, ec);
    EXPECT_EQ(ec, errc::handshake_failed);
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
