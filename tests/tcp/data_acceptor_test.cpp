// SPDX-License-Identifier: Apache-2.0
// Handshakes whose data connections don't come, and connections that belong to no handshake.
#include <kvferry/tcp/data_acceptor.hpp>

#include <gtest/gtest.h>

#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/allocation_limit.hpp"
#include "common/patience.hpp"
#include "tcp/data_acceptor_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::DataAcceptorTest;

TEST_F(DataAcceptorTest, AHandshakeWhoseConnectionsDoNotComeEndsAtItsDeadline) {
  (void)expect(std::chrono::milliseconds(1));
  context_.run();
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::timed_out)});
  EXPECT_NE(diagnostic_.find("made 0 of 2 data connections in time"), std::string::npos) << diagnostic_;
}

TEST_F(DataAcceptorTest, AHandshakeThatIsAbandonedLeavesNothingBehind) {
  (void)expect(std::chrono::hours(1));
  ASSERT_TRUE(host_->abandon);
  host_->abandon();
  context_.poll();
  EXPECT_TRUE(context_.stopped()) << "a timer is left";
  EXPECT_TRUE(ended_.empty());
  acceptor_->close();
  EXPECT_TRUE(ended_.empty());
}

TEST_F(DataAcceptorTest, ClosedItTellsWhoWaitsAndTakesNobody) {
  (void)expect(std::chrono::hours(1));
  acceptor_->close();
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::closed)});
  try {
    (void)expect(std::chrono::hours(1));
    FAIL();
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::closed);
  }
  context_.poll();
  EXPECT_TRUE(context_.stopped()) << "a timer is left";
}

TEST_F(DataAcceptorTest, HandshakesThatAwaitConnectionsAreBounded) {
  constexpr std::size_t most = std::size_t{1} << 14;
  for (std::size_t i = 0; i < most; ++i) {
    ASSERT_NO_THROW((void)expect(std::chrono::hours(1))) << i;
  }
  try {
    (void)expect(std::chrono::hours(1));
    FAIL();
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::resource_limit);
  }
}

TEST_F(DataAcceptorTest, TheOldestOfASourcesStrangersGivesWayAndIsToldToComeAgain) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  std::vector<std::byte> said;
  std::vector<tcp::socket> strangers;
  for (int i = 0; i < 64; ++i) {
    strangers.push_back(stranger());
  }
  EXPECT_FALSE(is_closed(strangers[0], said));
  strangers.push_back(stranger());
  EXPECT_TRUE(comes_to_be_closed(strangers[0], said));
  Hello again;
  ASSERT_EQ(said.size(), sizeof(again));
  std::memcpy(&again, said.data(), sizeof(again));
  EXPECT_EQ(again.magic, Hello::come_again);
  EXPECT_FALSE(is_closed(strangers[1], said));
  EXPECT_FALSE(is_closed(strangers.back(), said));
}

class CrowdedDataAcceptor : public DataAcceptorTest {
 protected:
  static constexpr std::size_t most = 20;  ///< A quarter of the descriptors.

  CrowdedDataAcceptor() {
    rlimit before{};
    ::getrlimit(RLIMIT_NOFILE, &before);
    rlimit few = before;
    few.rlim_cur = 4 * most;
    ::setrlimit(RLIMIT_NOFILE, &few);
    LinkOptions options;
    options.hello_timeout = std::chrono::hours(1);
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    ::setrlimit(RLIMIT_NOFILE, &before);
  }
};

TEST_F(CrowdedDataAcceptor, OfAllStrangersTheOldestOfTheGreediestSourceGivesWay) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  std::vector<std::byte> said;
  tcp::socket lonely = stranger("127.0.0.2");
  std::vector<tcp::socket> crowd;
  while (crowd.size() < most - 1) {
    crowd.push_back(stranger("127.0.0.3"));
  }
  EXPECT_FALSE(is_closed(crowd[0], said)) << "there is room for so many";
  tcp::socket next = stranger("127.0.0.4");
  EXPECT_TRUE(comes_to_be_closed(crowd[0], said));
  EXPECT_FALSE(is_closed(crowd[1], said));
  EXPECT_FALSE(is_closed(lonely, said));
  EXPECT_FALSE(is_closed(next, said));
}

TEST_F(CrowdedDataAcceptor, ALinkThatIsNeverWholeGivesWay) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  std::vector<tcp::socket> parts;
  // Half of the descriptors, and one more.
  for (std::size_t i = 0; i <= 2 * most; ++i) {
    ASSERT_TRUE(ended_.empty()) << i;
    const AcceptEndpoint endpoint = expect(std::chrono::hours(1));
    Hello hello;
    hello.magic = Hello::dialing;
    hello.lane_count = 2;
    std::memcpy(hello.secret.data(), endpoint.dial_secret.data(), hello.secret.size());
    parts.push_back(stranger());
    parts.back().write_some(asio::buffer(&hello, sizeof(hello)));
    context_.run_one();
    context_.poll();
  }
  while (ended_.empty() && context_.run_one_for(std::chrono::seconds(30)) != 0) {
  }
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::resource_limit)});
  EXPECT_NE(diagnostic_.find("made 1 of 2 data connections"), std::string::npos) << diagnostic_;
  std::vector<std::byte> said;
  EXPECT_TRUE(comes_to_be_closed(parts[0], said));
  EXPECT_FALSE(is_closed(parts[1], said));
  EXPECT_FALSE(is_closed(parts.back(), said));
}

TEST_F(DataAcceptorTest, ClosedItLetsStrangersGo) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  tcp::socket socket = stranger();
  std::vector<std::byte> said;
  EXPECT_FALSE(is_closed(socket, said));
  acceptor_->close();
  context_.poll();
  EXPECT_TRUE(context_.stopped()) << "a timer or a connection is left";
  EXPECT_TRUE(comes_to_be_closed(socket, said));
  EXPECT_TRUE(said.empty());
}

/// A connection's time for its hello is over as soon as it is accepted.
class HastyDataAcceptor : public DataAcceptorTest {
 protected:
  HastyDataAcceptor() {
    LinkOptions options;
    options.link.lane.events = std::make_shared<SocketEvents>(context_.get_executor());
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  }

  [[nodiscard]] std::uint64_t refused() const {
    const auto counts = refusals_->snapshot();
    return counts.empty() ? 0 : counts.front().count;
  }
};

// The reactor finds the hello and the end of its time at once, and two threads deal with them.
TEST_F(HastyDataAcceptor, AHelloThatMeetsTheEndOfItsTimeCountsOnce) {
  std::shared_ptr<kit::Link> link;
  const AcceptEndpoint endpoint =
      acceptor_->expect(host_, 1, kit::Clock::now() + std::chrono::hours(1),
                        [&](std::error_code ec, const std::shared_ptr<kit::Link>& made, const std::string&) {
                          ended_.push_back(ec);
                          link = made;
                          std::thread([this] { context_.poll(); }).join();
                        });
  Hello hello;
  hello.magic = Hello::dialing;
  hello.lane_count = 1;
  std::memcpy(hello.secret.data(), endpoint.dial_secret.data(), hello.secret.size());
  asio::io_context other_context;
  tcp::socket dialing(other_context);
  std::uint64_t refused_before = 0;
  while (ended_.empty()) {
    refused_before = refused();
    dialing = tcp::socket(other_context, tcp::v4());
    dialing.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    dialing.write_some(asio::buffer(&hello, sizeof(hello)));
    while (ended_.empty() && refused() == refused_before) {
      context_.run_one();  // the hello may come too late
    }
  }
  EXPECT_EQ(ended_, std::vector{std::error_code()});
  EXPECT_EQ(refused(), refused_before) << "who was admitted is none that said nothing in time";
  EXPECT_NO_THROW((void)expect(std::chrono::hours(1)));
  EXPECT_EQ(ended_.size(), 1U);
  ASSERT_TRUE(link);
  link->shut(errc::closed, "the test ends");
}

// Memory is used up at whatever point of its being accepted.
TEST_F(DataAcceptorTest, AConnectionThatThereIsNoMemoryForDoesNotKeepLaterOnesOut) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  std::vector<std::byte> said;
  std::vector<tcp::socket> unlucky;
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    context_.poll();
    unlucky.emplace_back(context_, tcp::v4()).connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    test::allocation_refused = false;
    test::allocations_left = allocations;
    try {
      context_.run_one();
    } catch (const std::bad_alloc&) {
    }
    test::allocations_left = test::unlimited_allocations;
    context_.restart();  // it may have run out of work
    refused = test::allocation_refused;
    unlucky.back().non_blocking(true);

    // A handshake comes before a connection, and this one's hello is none, so it is let go as soon as it has come.
    (void)expect(std::chrono::hours(1));
    tcp::socket next(context_, tcp::v4());
    next.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    next.write_some(asio::buffer(std::array<char, sizeof(Hello)>{}));
    next.non_blocking(true);
    // The kernel may deliver that a little later, when there is nothing more to run.
    const auto until = kit::Clock::now() + kvferry_test::long_enough;
    while (!is_closed(next, said)) {
      ASSERT_LT(kit::Clock::now(), until) << allocations;
      context_.run_one_for(std::chrono::milliseconds(10));
    }
  }
  std::ptrdiff_t lost = 0;
  for (const auto until = kit::Clock::now() + kvferry_test::long_enough; lost <= 2 && kit::Clock::now() < until;) {
    lost = std::ranges::count_if(unlucky, [&](tcp::socket& one) { return is_closed(one, said); });
  }
  EXPECT_GT(lost, 2);
}

TEST_F(DataAcceptorTest, AHandshakeThatThereIsNoMemoryForIsNotAwaitedWithoutADeadline) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), LinkOptions(), refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
    ended_.clear();
    bool thrown = false;
    test::allocation_refused = false;
    test::allocations_left = allocations;
    try {
      (void)expect(std::chrono::hours(1));
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    acceptor_->close();
    EXPECT_EQ(ended_.size(), thrown ? 0U : 1U) << allocations;
  }
}

class ImpatientDataAcceptor : public DataAcceptorTest {
 protected:
  ImpatientDataAcceptor() : DataAcceptorTest(std::chrono::milliseconds(1)) {}
};

TEST_F(ImpatientDataAcceptor, LetsThoseGoThatDoNotSayWhoTheyAre) {
  acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
  tcp::socket socket = stranger();
  std::vector<std::byte> said;
  while (!is_closed(socket, said)) {
    context_.run_one_for(
        std::chrono::milliseconds(10));  // the kernel may deliver that when there is nothing more to run
  }
  EXPECT_TRUE(said.empty());
}

}  // namespace
}  // namespace kvferry::tcp
