// SPDX-License-Identifier: Apache-2.0
// What becomes of handshakes whose data connections don't come, and of connections that belong to no handshake.
#include <kvferry/tcp/data_acceptor.hpp>

#include <gtest/gtest.h>

#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>

#include <sys/resource.h>

#include <chrono>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;

/// For whom a handshake's connections are awaited.
class AwaitingHost final : public kit::LinkHost {
 public:
  AwaitingHost() { peer_.id = "peer"; }
  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override {
    return kit::RegionList::of({});
  }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte>, std::uint64_t) override { return false; }
  void when_abandoned(std::function<void()> drop) override { abandon = std::move(drop); }
  void link_failed(const kit::Link&, std::error_code) override {}

  std::function<void()> abandon;

 private:
  kit::PeerDescription peer_;
};

class DataAcceptorTest : public ::testing::Test {
 protected:
  explicit DataAcceptorTest(std::chrono::milliseconds hello_timeout = std::chrono::hours(1)) {
    LinkOptions options;
    options.hello_timeout = hello_timeout;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
  }
  ~DataAcceptorTest() override {
    acceptor_->close();
    context_.run();
  }

  AcceptEndpoint expect(std::chrono::milliseconds timeout) {
    return acceptor_->expect(host_, 2, kit::Clock::now() + timeout,
                             [this](std::error_code ec, const std::shared_ptr<kit::Link>&, std::string diagnostic) {
                               ended_.push_back(ec);
                               diagnostic_ = std::move(diagnostic);
                             });
  }

  /// A connection that has been accepted, and says nothing.
  tcp::socket stranger(const char* source = "127.0.0.1") {
    tcp::socket socket(context_, tcp::v4());
    socket.bind({asio::ip::make_address(source), 0});
    socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    socket.non_blocking(true);
    // The kernel has it in the acceptor's queue by now, or will at once.
    context_.run_one();
    context_.poll();
    return socket;
  }

  /// Whether it has been closed; `said` is what came before.
  static bool is_closed(tcp::socket& socket, std::vector<std::byte>& said) {
    said.resize(sizeof(Hello) + 1);
    std::error_code ec;
    said.resize(asio::read(socket, asio::buffer(said), ec));
    return ec != asio::error::would_block;
  }

  asio::io_context context_;
  std::shared_ptr<kit::Refusals> refusals_ = std::make_shared<kit::Refusals>(std::make_shared<kit::Logger>());
  std::shared_ptr<AwaitingHost> host_ = std::make_shared<AwaitingHost>();
  std::shared_ptr<DataAcceptor> acceptor_;
  std::vector<std::error_code> ended_;
  std::string diagnostic_;
};

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
  EXPECT_TRUE(is_closed(strangers[0], said));
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
  EXPECT_TRUE(is_closed(crowd[0], said));
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
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::resource_limit)});
  EXPECT_NE(diagnostic_.find("made 1 of 2 data connections"), std::string::npos) << diagnostic_;
  std::vector<std::byte> said;
  EXPECT_TRUE(is_closed(parts[0], said));
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
  EXPECT_TRUE(is_closed(socket, said));
  EXPECT_TRUE(said.empty());
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
    context_.run_one();
  }
  EXPECT_TRUE(said.empty());
}

}  // namespace
}  // namespace kvferry::tcp
