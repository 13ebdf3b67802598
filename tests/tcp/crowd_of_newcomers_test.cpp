// SPDX-License-Identifier: Apache-2.0
// More connections name a handshake than a peer of it makes: they wait, and others don't.
#include <gtest/gtest.h>

#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp/data_acceptor.hpp>

#include "common/allocation_limit.hpp"
#include "common/patience.hpp"
#include "tcp/data_acceptor_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::DataAcceptorTest;

/// Many connections name a handshake, of which two are to come.
class DataAcceptorInACrowd : public DataAcceptorTest {
 protected:
  static constexpr std::size_t at_once = 12;  ///< Twice as many as are to come, and 8.

  struct Named {
    tcp::socket socket;
    std::unique_ptr<TlsStream> tls;
    /// The acceptor has shown that it has the key.
    [[nodiscard]] bool is_answered() {
      if (!answered) {
        answered = !tls->shake_hands();
      }
      return answered;
    }
    bool answered = false;
  };

  /// No time passes for those that wait, unless a test is about their turns.
  explicit DataAcceptorInACrowd(std::chrono::milliseconds turn_pause = std::chrono::hours(1)) {
    acceptor_ = acceptor_at(context_, turn_pause, std::chrono::hours(1));
    one_ = handshake();
    abandon_one_ = host_->abandon;
    crowd_ = crowd_of(one_);
  }

  std::shared_ptr<DataAcceptor> acceptor_at(asio::io_context& context, std::chrono::milliseconds turn_pause,
                                            std::chrono::milliseconds hello_timeout) {
    LinkOptions options;
    options.hello_timeout = hello_timeout;
    options.turn_pause = turn_pause;
    options.tls = tls_;
    auto acceptor = std::make_shared<DataAcceptor>(context.get_executor(), options, refusals_);
    acceptor->listen("127.0.0.1", 0, std::chrono::seconds(30));
    return acceptor;
  }

  static bool says_come_again(const std::vector<std::byte>& said) {
    return said.size() == sizeof(Hello) && std::memcmp(said.data(), &Hello::come_again, sizeof(Hello::come_again)) == 0;
  }

  using Crowd = std::vector<std::unique_ptr<Named>>;

  /// As many as needn't wait.
  Crowd crowd_of(const TlsKey& key) {
    Crowd crowd;
    while (crowd.size() < at_once) {
      crowd.push_back(named(key));
    }
    EXPECT_TRUE(comes_true([&] { return waiting(crowd) == 0; }));
    return crowd;
  }
  static std::ptrdiff_t waiting(const Crowd& crowd) {
    return std::ranges::count_if(crowd, [](const auto& one) { return !one->is_answered(); });
  }

  TlsKey handshake() { return key_of(expect(std::chrono::hours(1))); }
  /// Has said the first words of TLS.
  std::unique_ptr<Named> named(const TlsKey& key) {
    tcp::socket socket(context_, tcp::v4());
    socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    socket.non_blocking(true);
    return named(key, std::move(socket));
  }
  std::unique_ptr<Named> named(const TlsKey& key, tcp::socket socket) {
    auto made = std::make_unique<Named>(Named{std::move(socket), nullptr});
    made->tls = tls_->dial(made->socket.native_handle(), key);
    EXPECT_EQ(made->tls->shake_hands(), asio::error::would_block);
    return made;
  }
  /// Or it is turned away.
  bool is_served(Named& one) {
    std::error_code ec;
    EXPECT_TRUE(comes_true([&] {
      ec = one.tls->shake_hands();
      return ec != asio::error::would_block;
    }));
    one.answered = !ec;
    return one.answered;
  }
  /// Ends them, and returns when the acceptor has noticed.
  void leave(Crowd& crowd) {
    for (const auto& one : crowd) {
      one->socket.shutdown(tcp::socket::shutdown_send);
      std::vector<std::byte> said;
      EXPECT_TRUE(comes_true([&] { return is_closed(one->socket, said); }));
    }
    crowd.clear();
  }
  /// The acceptor does its work until then.
  template <class Condition>
  bool comes_true(Condition condition) {
    return comes_true(context_, condition);
  }
  template <class Condition>
  static bool comes_true(asio::io_context& context, Condition condition) {
    const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
    while (!condition() && kit::Clock::now() < deadline) {
      context.run_one_for(std::chrono::milliseconds(10));
    }
    return condition();
  }

  const std::shared_ptr<TlsContext> tls_ = TlsContext::create();
  TlsKey one_;
  std::function<void()> abandon_one_;
  Crowd crowd_;
};

class DataAcceptorThatGivesTurns : public DataAcceptorInACrowd {
 protected:
  DataAcceptorThatGivesTurns() : DataAcceptorInACrowd(std::chrono::milliseconds(4)) {}
};

TEST_F(DataAcceptorInACrowd, WhoComesLaterIsServedBeforeFurtherOnesOfTheSameHandshake) {
  Crowd further;
  for (int i = 0; i < 40; ++i) {
    further.push_back(named(one_));
  }
  const TlsKey other = handshake();
  const auto newcomer = named(other);
  EXPECT_TRUE(comes_true([&] { return newcomer->is_answered(); }));
  EXPECT_EQ(waiting(further), 40);
}

TEST_F(DataAcceptorThatGivesTurns, GivesOneToEach) {
  Crowd further;
  for (int i = 0; i < 40; ++i) {
    further.push_back(named(one_));
  }
  EXPECT_TRUE(comes_true([&] { return waiting(further) == 0; }));
}

TEST_F(DataAcceptorInACrowd, FurtherOnesOfAHandshakeMakeRoomBeforeOlderConnections) {
  tcp::socket silent = stranger();
  std::vector<std::byte> said;
  Crowd further;
  while (refusals_->snapshot().empty()) {
    further.push_back(named(one_));
    ASSERT_LT(further.size(), 4096U);
    context_.poll();
  }
  EXPECT_FALSE(is_closed(silent, said));
  EXPECT_FALSE(is_closed(crowd_.front()->socket, said));
  EXPECT_TRUE(comes_to_be_closed(further.front()->socket, said));
  EXPECT_TRUE(says_come_again(said));
}

// Or whoever says nothing could keep a peer out whose handshake others have named.
TEST_F(DataAcceptorInACrowd, FurtherOnesOfAHandshakeDoNotMakeRoomForManySilentOnes) {
  leave(crowd_);
  std::vector<tcp::socket> silent;
  silent.push_back(stranger());
  const auto further = named(one_);
  std::vector<std::byte> said;
  while (refusals_->snapshot().empty()) {
    silent.push_back(stranger());
    ASSERT_LT(silent.size(), 4096U);
  }
  EXPECT_TRUE(comes_to_be_closed(silent.front(), said));
  EXPECT_FALSE(is_closed(further->socket, said));
}

TEST_F(DataAcceptorInACrowd, ClosedItLetsThoseGoThatWait) {
  Crowd further;
  for (int i = 0; i < 3; ++i) {
    further.push_back(named(one_));
  }
  const auto newcomer = named(handshake());
  EXPECT_TRUE(comes_true([&] { return newcomer->is_answered(); }));
  EXPECT_EQ(waiting(further), 3);
  acceptor_->close();
  context_.poll();
  EXPECT_TRUE(context_.stopped()) << "a timer or a connection is left";
  std::vector<std::byte> said;
  for (const auto& one : further) {
    if (one->is_answered()) {
      continue;  // it had its turn before, on a machine that was busy for so long
    }
    EXPECT_TRUE(comes_to_be_closed(one->socket, said));
    EXPECT_TRUE(said.empty());
  }
}

TEST_F(DataAcceptorInACrowd, GoesWithItsThreadsWhileSomeWait) {
  const auto usual = std::exchange(acceptor_, nullptr);
  auto context = std::make_unique<asio::io_context>();
  acceptor_ = acceptor_at(*context, std::chrono::hours(1), std::chrono::hours(1));
  const std::weak_ptr<DataAcceptor> gone = acceptor_;
  const TlsKey key = handshake();
  Crowd crowd;
  while (crowd.size() < at_once + 3) {
    crowd.push_back(named(key));
  }
  const auto newcomer = named(handshake());
  EXPECT_TRUE(comes_true(*context, [&] { return waiting(crowd) == 3 && newcomer->is_answered(); }));
  acceptor_ = usual;
  context.reset();
  EXPECT_TRUE(gone.expired());
  std::vector<std::byte> said;
  for (const auto& one : crowd) {
    EXPECT_TRUE(comes_to_be_closed(one->socket, said));
  }
}

// An honest one comes again then, and is served.
TEST_F(DataAcceptorInACrowd, WhoGetsNoTurnInTimeIsToldToComeAgainAndGetsOneLater) {
  acceptor_->close();
  acceptor_ = acceptor_at(context_, std::chrono::milliseconds(60), std::chrono::milliseconds(20));
  const TlsKey key = handshake();
  std::size_t told = 0;
  const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
  for (bool served = false; !served || told == 0;) {
    ASSERT_LT(kit::Clock::now(), deadline) << told;
    const auto one = named(key);
    served = is_served(*one);
    const auto said = one->tls->first_received();
    told += !served && said.size() == 8 && std::memcmp(said.data(), &Hello::come_again, said.size()) == 0 ? 1U : 0U;
  }
  const auto counts = refusals_->snapshot();
  EXPECT_TRUE(std::ranges::any_of(counts, [](const auto& one) { return one.cause == errc::resource_limit; }));
}

TEST_F(DataAcceptorInACrowd, WhatSomeoneHasWaitedIsNoneOfTheTimeForItsHello) {
  std::chrono::milliseconds pause{75};
  std::chrono::milliseconds time{150};
  const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
  for (bool answered = false; !answered;) {
    ASSERT_LT(kit::Clock::now(), deadline);
    // On a busy machine their time may be over before they have got so far.
    pause *= 2;
    time *= 2;
    acceptor_->close();
    acceptor_ = acceptor_at(context_, pause, time);
    const TlsKey key = handshake();
    Crowd crowd;
    do {
      crowd.push_back(named(key));
    } while (is_served(*crowd.back()) && crowd.size() < at_once);
    if (crowd.size() < at_once || !crowd.back()->answered) {
      continue;
    }
    const auto begin = kit::Clock::now();
    const auto one = named(key);
    answered = is_served(*one);
    if (answered) {
      std::vector<std::byte> said;
      EXPECT_TRUE(comes_true([&] { return is_closed(one->socket, said); }));
      EXPECT_GE(kit::Clock::now() - begin, pause + time);
    }
  }
}

/// So that as many turns as there are connections would take too long.
class DataAcceptorThatGivesFewTurns : public DataAcceptorInACrowd {
 protected:
  static constexpr int many = 30;
  DataAcceptorThatGivesFewTurns() : DataAcceptorInACrowd(2 * kvferry_test::long_enough / many) {}
};

TEST_F(DataAcceptorThatGivesFewTurns, GivesNoneToThoseWhoseHandshakeIsNotAwaitedAnyMore) {
  const TlsKey other = handshake();
  const Crowd crowd = crowd_of(other);
  Crowd further;
  for (int i = 0; i < many; ++i) {
    further.push_back(named(one_));
  }
  const auto awaited = named(other);
  const auto newcomer = named(handshake());
  EXPECT_TRUE(comes_true([&] { return newcomer->is_answered(); })) << "all others have named theirs by then";
  (void)waiting(further);  // on a busy machine some have had a turn before
  abandon_one_();
  EXPECT_TRUE(comes_true([&] { return awaited->is_answered(); }));
  std::vector<std::byte> said;
  for (const auto& one : further) {
    EXPECT_TRUE(comes_to_be_closed(one->socket, said));
    EXPECT_TRUE(one->answered || said.empty());
  }
}

// Memory is used up at whatever point of its having to wait, also where Asio's list of timers has to grow.
TEST_F(DataAcceptorThatGivesTurns, OneThatThereIsNoMemoryForDoesNotKeepLaterOnesWaiting) {
  std::vector<asio::steady_timer> timers;
  std::size_t refusals = 0;
  for (int i = 0; i < 24; ++i) {
    timers.emplace_back(context_, std::chrono::hours(1)).async_wait([](std::error_code) {});
    bool refused = true;
    for (std::size_t allocations = 0; refused; ++allocations) {
      tcp::socket socket = stranger();
      const auto one = named(one_, std::move(socket));
      test::allocation_refused = false;
      test::allocations_left = allocations;
      context_.poll();
      test::allocations_left = test::unlimited_allocations;
      refused = test::allocation_refused;
      refusals += std::size_t{refused};
      if (!refused) {
        ASSERT_TRUE(comes_true([&] { return one->is_answered(); })) << allocations << ' ' << i;
      }
    }
    context_.poll();
  }
  EXPECT_GT(refusals, 24U);
  timers.clear();
}

}  // namespace
}  // namespace kvferry::tcp
