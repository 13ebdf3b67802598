// SPDX-License-Identifier: Apache-2.0
#include <kvferry/handshake/handshake_attempts.hpp>

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <future>
#include <utility>
#include <vector>

#include "common/comes_true.hpp"
#include "common/open_descriptors.hpp"
#include "common/unanswering_port.hpp"
#include "core/handshake_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using namespace std::chrono_literals;
using test::ask;
using test::echo;
using test::get;

std::size_t open_descriptors() { return kvferry_test::open_descriptors().size(); }

TEST(ConnectSlots, WhatIsTriedAgainLeavesSomeToWhatIsNew) {
  const ConnectSlots::TimePoint now{};
  ConnectSlots slots(8);
  HandshakeAttempts owner;
  std::vector<ConnectSlots::Slot> taken;
  for (int i = 0; i < 6; ++i) {
    taken.push_back(slots.take(owner, true, now).value());
  }
  EXPECT_FALSE(slots.take(owner, true, now));
  taken.push_back(slots.take(owner, false, now).value());
  taken.push_back(slots.take(owner, false, now).value());
  EXPECT_FALSE(slots.take(owner, false, now)) << "nobody has had the time to connect";
  taken[3].give_back();
  EXPECT_TRUE(slots.take(owner, false, now));
}

/// This process's sockets that have asked for a connection and have got no answer.
std::ptrdiff_t unanswered() {
  return std::ranges::count_if(kvferry_test::open_descriptors(), [](const auto& one) {
    tcp_info info{};
    socklen_t size = sizeof(info);
    return ::getsockopt(one.first, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 && info.tcpi_state == TCP_SYN_SENT;
  });
}

class HandshakeAttemptsTest : public test::HandshakeFixture {};

TEST_F(HandshakeAttemptsTest, AQuestionToWhereNobodyListensTakesNoDescriptorsWhileItWaits) {
  constexpr std::size_t many = 100;
  const test::SilentPort port;
  const HandshakeService server(listening(), handler());
  HandshakeService client({}, nullptr);
  EXPECT_EQ(get(ask(client, server.bound_url(), echo(1))).message, echo(1));
  const std::size_t before = open_descriptors();
  std::vector<std::future<test::Outcome>> outcomes;
  for (std::size_t i = 0; i < many; ++i) {
    outcomes.push_back(ask(client, port.url(), echo(2), 2s));
  }
  // At times some of them try: the least is what they hold.
  std::size_t least = ~std::size_t{0};
  std::size_t most = 0;
  do {
    const std::size_t now = open_descriptors();
    least = std::min(least, now);
    most = std::max(most, now);
  } while (outcomes.back().wait_for(5ms) != std::future_status::ready);
  EXPECT_LT(least, before + many);
  for (auto& outcome : outcomes) {
    EXPECT_EQ(get(std::move(outcome)).ec, errc::timed_out);
  }
}

TEST_F(HandshakeAttemptsTest, QuestionsToHostsThatAreGoneHoldFewDescriptorsAndNoOtherQuestionUp) {
  rlimit few{};
  ::getrlimit(RLIMIT_NOFILE, &few);
  const rlim_t allowed = std::exchange(few.rlim_cur, 240);
  ::setrlimit(RLIMIT_NOFILE, &few);
  const test::UnansweringPort port("127.0.0.1");
  const auto gone = "tcp://127.0.0.1:" + std::to_string(port.port());
  const HandshakeService server(listening(), handler());
  HandshakeService client({}, nullptr);
  const std::size_t before = open_descriptors();
  std::vector<std::future<test::Outcome>> outcomes;
  for (int i = 0; i < 200; ++i) {
    outcomes.push_back(ask(client, gone, echo(2), 1min));
  }
  for (std::uint64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(get(ask(client, server.bound_url(), echo(i), 30s)).message, echo(i));
    // ZeroMQ closes what has been given up on a thread of its own, which a busy machine may leave behind.
    EXPECT_TRUE(kvferry_test::comes_true([&] { return open_descriptors() < before + 100; })) << open_descriptors();
  }
  client.close();
  for (auto& outcome : outcomes) {
    EXPECT_EQ(get(std::move(outcome)).ec, errc::closed);
  }
  few.rlim_cur = allowed;
  ::setrlimit(RLIMIT_NOFILE, &few);
}

// The kernel would ask again after a second.
TEST_F(HandshakeAttemptsTest, WhoFindsTheListenQueueFullComesAgainWithinASecond) {
  HandshakeService client({}, nullptr);
  bool came_again = false;
  for (int i = 0; i < 20 && !came_again; ++i) {  // a busy machine may leave it no time
    const auto limit = std::chrono::steady_clock::now() + 900ms;
    test::UnansweringPort port("127.0.0.1");
    const auto others = unanswered();
    const auto outcome = ask(client, "tcp://127.0.0.1:" + std::to_string(port.port()), echo(1), 900ms);
    while (unanswered() == others && outcome.wait_for(1ms) != std::future_status::ready) {
    }
    port.make_room();
    while (!came_again && outcome.wait_for(5ms) != std::future_status::ready) {
      came_again = port.take_all() > 0 && std::chrono::steady_clock::now() < limit;
    }
  }
  EXPECT_TRUE(came_again);
}

}  // namespace
}  // namespace kvferry::kit
