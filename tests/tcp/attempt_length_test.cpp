// SPDX-License-Identifier: Apache-2.0
// How long an attempt to connect lasts, on both sides.
#include <gtest/gtest.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <chrono>
#include <cstdint>
#include <limits>
#include <string>
#include <system_error>
#include <thread>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/silent_listener.hpp>

#include "channel_pair.hpp"
#include "init_question.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

// Two connections that are made at the same time would each take the other's place.
TEST(Handshake, WhoHasAcceptedADialWaitsForItsConnection) {
  asio::io_context context;
  asio::ip::tcp::acceptor mute(context, {asio::ip::make_address("127.0.0.1"), 0});
  TcpOptions deaf;
  deaf.advertised_data_address = "127.0.0.1:" + std::to_string(mute.local_endpoint().port());
  Node b(4, deaf);
  Node a(4);
  Node probe(1, {}, false);
  const auto incarnation = ask_who(probe, b);
  auto connecting = a.channel->async_lazy_init_peer_connection(
      "a", "b", b.channel->peer_init_url(), {}, {.timeout = milliseconds(long_enough)}, asio::use_future);
  asio::ip::tcp::socket made(context);
  mute.accept(made);  // b has accepted
  for (int i = 0; i < 5; ++i) {
    const auto [ec, answer] = ask_as(probe, "b", a, "a", incarnation);
    ASSERT_FALSE(ec) << ec.message();
    EXPECT_EQ(answer->status, kit::InitAnswer::yield);
  }
  a.channel->close();
  EXPECT_THROW(connecting.get(), std::system_error);
}

// Else one that is tried again and again, each time too shortly, would keep the peer's from ever getting through.
TEST(Handshake, TheSmallerIncarnationsDialCountsIfItLastsUntilTheOtherAsksAgain) {
  constexpr auto greatest = std::numeric_limits<std::uint64_t>::max();
  const kvferry::testing::SilentListener silent;
  Node probe(1, {}, false);
  for (const bool lasts : {true, false}) {
    Node a(4);
    auto connecting = a.channel->async_lazy_init_peer_connection(
        "a", "b", silent.url(), {}, {.timeout = lasts ? milliseconds(long_enough) : milliseconds(300)},
        asio::use_future);
    const auto [ec, answer] = ask_as(probe, "b", a, "a", greatest);
    ASSERT_FALSE(ec) << ec.message();
    EXPECT_EQ(answer->status, lasts ? kit::InitAnswer::yield : kit::InitAnswer::ok);
    a.channel->close();
    EXPECT_THROW(connecting.get(), std::system_error);
  }
}

TEST(Handshake, LastsAsLongAsTheMoreImpatientSideSays) {
  TcpOptions impatient;
  impatient.handshake_timeout = milliseconds(300);
  Node b(4, impatient);
  asio::io_context context;  // busy while the other side's patience ends
  auto work = asio::make_work_guard(context);
  TcpOptions options;
  options.executor = context.get_executor();
  Node a(4, options, false);
  std::string diagnostic;
  auto connecting = a.channel->async_lazy_init_peer_connection(
      "a", "b", b.channel->peer_init_url(), {}, {.timeout = milliseconds(long_enough), .diagnostic = &diagnostic},
      asio::use_future);
  Node other(1, {}, false);
  const auto asked = std::chrono::steady_clock::now();
  for (bool waited = false; !waited;) {
    // b's answer says how long it waits; when a handshake that was begun later has ended, so has a's first one.
    std::error_code ec;
    auto answer = decode_side_message<kit::InitAnswer>(
        other.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(question()), {}, ec));
    ASSERT_FALSE(ec);
    ASSERT_TRUE(answer.timeout_ms);
    EXPECT_LE(*answer.timeout_ms, 300U);
    waited = std::chrono::steady_clock::now() - asked > 2 * impatient.handshake_timeout;
  }
  std::thread runner([&] { context.run(); });
  EXPECT_NO_THROW(connecting.get()) << diagnostic;
  a.channel->close();
  work.reset();
  runner.join();
}

TEST(Handshake, AnAttemptThatTheDialingSideGivesUpEndsAtTheAcceptingSideToo) {
  Node b(4);
  Node other(1, {}, false);
  auto made = question();
  made.timeout_ms = 5;
  std::error_code ec;
  const auto answer = decode_side_message<kit::InitAnswer>(
      other.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(made), {}, ec));
  ASSERT_FALSE(ec);
  ASSERT_TRUE(answer.timeout_ms);
  EXPECT_LE(*answer.timeout_ms, 5U);
}

}  // namespace
}  // namespace kvferry::tcp::testing
