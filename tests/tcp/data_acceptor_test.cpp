// SPDX-License-Identifier: Apache-2.0
// Handshakes whose data connections don't come, and connections that belong to no handshake.
#include <kvferry/tcp/data_acceptor.hpp>

#include <gtest/gtest.h>

#include <asio/buffer.hpp>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>

#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/allocation_limit.hpp"
#include "common/patience.hpp"

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
    acceptor_.reset();
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
  /// Likewise, where it has to be: the kernel may deliver that a little later.
  static bool comes_to_be_closed(tcp::socket& socket, std::vector<std::byte>& said) {
    said.resize(sizeof(Hello) + 1);
    std::size_t come = 0;
    pollfd readable{socket.native_handle(), POLLIN, 0};
    while (::poll(&readable, 1, 30'000) == 1) {
      std::error_code ec;
      come += asio::read(socket, asio::buffer(said.data() + come, said.size() - come), ec);
      if (ec != asio::error::would_block) {
        said.resize(come);
        return true;
      }
    }
    return false;
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

/// The first handshake of TLS's that is accepted stops at its first step, until it is let go.
class HeldTls final : public TlsContext {
 public:
  [[nodiscard]] std::shared_ptr<const TlsCertificates> read_certificates(const CertificateFiles& files) override {
    return real_->read_certificates(files);
  }
  [[nodiscard]] std::unique_ptr<TlsStream> dial(int descriptor, const TlsKey& key) override {
    return real_->dial(descriptor, key);
  }
  [[nodiscard]] std::unique_ptr<TlsStream> accept(int descriptor, std::span<const std::byte> opening,
                                                  FindKey find) override {
    auto stream = real_->accept(descriptor, opening, std::move(find));
    if (!held_one_.exchange(true)) {
      begun.set_value();
      go_on_.wait();
    }
    return stream;
  }

  std::promise<void> begun;
  std::promise<void> let_go;

 private:
  const std::shared_ptr<TlsContext> real_ = TlsContext::create();
  std::future<void> go_on_ = let_go.get_future();
  std::atomic<bool> held_one_ = false;
};

/// While a newcomer's keys are being agreed on, by a thread that doesn't get on.
class DataAcceptorWithASlowNewcomer : public DataAcceptorTest {
 protected:
  static constexpr int wait_ms = 30'000;

  DataAcceptorWithASlowNewcomer() {
    LinkOptions options;
    options.hello_timeout = std::chrono::hours(1);
    options.tls = tls_;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
    key_ = key_of(expect(std::chrono::hours(1)));
    slow_ = newcomer();
    auto begun = tls_->begun.get_future();
    for (int i = 0; i < 2; ++i) {
      threads_.emplace_back([this] { context_.run(); });
    }
    EXPECT_EQ(begun.wait_for(kvferry_test::long_enough), std::future_status::ready);
  }
  ~DataAcceptorWithASlowNewcomer() override {
    let_go();
    acceptor_->close();
    threads_.clear();
  }

  void let_go() {
    if (!std::exchange(gone_on_, true)) {
      tls_->let_go.set_value();
    }
  }

  static TlsKey key_of(const AcceptEndpoint& endpoint) {
    TlsKey key;
    std::ranges::copy(endpoint.tls_identity.value(), key.identity.begin());
    std::ranges::copy(endpoint.tls_secret.value(), key.secret.begin());
    return key;
  }

  struct Newcomer {
    tcp::socket socket;
    std::unique_ptr<TlsStream> tls;
  };

  /// A newcomer that has sent the first bytes of TLS.
  std::unique_ptr<Newcomer> newcomer() {
    auto made = std::make_unique<Newcomer>(Newcomer{tcp::socket(other_context_, tcp::v4()), nullptr});
    made->socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    made->socket.non_blocking(true);
    made->tls = tls_->dial(made->socket.native_handle(), key_);
    EXPECT_EQ(made->tls->shake_hands(), asio::error::would_block);
    return made;
  }

  /// Whether `call` returns.
  template <class Call>
  bool returns(Call call) {
    auto done = std::async(std::launch::async, call);
    const bool in_time = done.wait_for(kvferry_test::long_enough) == std::future_status::ready;
    if (!in_time) {
      let_go();
    }
    return in_time;
  }

  /// Whether the slow one's connection ends.
  bool slow_one_is_closed() {
    std::array<std::byte, 4096> said;
    pollfd readable{slow_->socket.native_handle(), POLLIN, 0};
    while (::poll(&readable, 1, wait_ms) == 1) {
      const ssize_t received = ::recv(readable.fd, said.data(), said.size(), MSG_DONTWAIT);
      if (received == 0 || (received < 0 && errno != EAGAIN)) {
        return true;
      }
    }
    return false;
  }

  asio::io_context other_context_;
  const std::shared_ptr<HeldTls> tls_ = std::make_shared<HeldTls>();
  TlsKey key_;
  std::unique_ptr<Newcomer> slow_;
  bool gone_on_ = false;
  std::vector<std::jthread> threads_;
};

TEST_F(DataAcceptorWithASlowNewcomer, OthersAreExpectedAndGetIn) {
  EXPECT_TRUE(returns([this] { (void)expect(std::chrono::hours(1)); }));
  const auto quick = newcomer();
  pollfd readable{quick->socket.native_handle(), POLLIN, 0};
  ASSERT_EQ(::poll(&readable, 1, wait_ms), 1);
  EXPECT_FALSE(quick->tls->shake_hands());
  EXPECT_TRUE(quick->tls->shaken());
}

TEST_F(DataAcceptorWithASlowNewcomer, ClosingDoesNotWaitForIt) {
  EXPECT_TRUE(returns([this] { acceptor_->close(); }));
  let_go();
  EXPECT_TRUE(slow_one_is_closed());
}

TEST_F(DataAcceptorWithASlowNewcomer, WhoMakesRoomMeanwhileIsResetByTheThreadThatIsAtIt) {
  std::vector<tcp::socket> crowd;
  for (int i = 0; i < 64; ++i) {
    crowd.emplace_back(other_context_, tcp::v4()).connect({asio::ip::address_v4::loopback(), acceptor_->port()});
  }
  // The last of the crowd is one too many, and the slow one is the oldest.
  const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
  while (refusals_->snapshot().empty() && kit::Clock::now() < deadline) {
    std::this_thread::yield();
  }
  ASSERT_EQ(refusals_->snapshot().size(), 1U);
  let_go();
  EXPECT_TRUE(slow_one_is_closed());
}

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

  DataAcceptorInACrowd() {
    LinkOptions options;
    options.hello_timeout = std::chrono::hours(1);
    options.tls = tls_;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
    one_ = handshake();
    while (crowd_.size() < at_once) {
      crowd_.push_back(named(one_));
    }
    EXPECT_TRUE(comes_true(
        [this] { return std::ranges::all_of(crowd_, [](const auto& newcomer) { return newcomer->is_answered(); }); }));
  }

  TlsKey handshake() {
    const AcceptEndpoint endpoint = expect(std::chrono::hours(1));
    TlsKey key;
    std::ranges::copy(endpoint.tls_identity.value(), key.identity.begin());
    std::ranges::copy(endpoint.tls_secret.value(), key.secret.begin());
    return key;
  }
  /// Has said the first words of TLS.
  std::unique_ptr<Named> named(const TlsKey& key) {
    auto made = std::make_unique<Named>(Named{tcp::socket(context_, tcp::v4()), nullptr});
    made->socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    made->socket.non_blocking(true);
    made->tls = tls_->dial(made->socket.native_handle(), key);
    EXPECT_EQ(made->tls->shake_hands(), asio::error::would_block);
    return made;
  }
  /// The acceptor does its work until then.
  template <class Condition>
  bool comes_true(Condition condition) {
    const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
    while (!condition() && kit::Clock::now() < deadline) {
      context_.run_one_for(std::chrono::milliseconds(10));
    }
    return condition();
  }

  const std::shared_ptr<TlsContext> tls_ = TlsContext::create();
  TlsKey one_;
  std::vector<std::unique_ptr<Named>> crowd_;
};

TEST_F(DataAcceptorInACrowd, WhoComesLaterIsServedBeforeFurtherOnesOfTheSameHandshake) {
  std::vector<std::unique_ptr<Named>> further;
  for (int i = 0; i < 40; ++i) {
    further.push_back(named(one_));
  }
  const TlsKey other = handshake();
  const auto newcomer = named(other);
  EXPECT_TRUE(comes_true([&] { return newcomer->is_answered(); }));
  const auto wait_still = [&] {
    return std::ranges::count_if(further, [](const auto& one) { return !one->is_answered(); });
  };
  EXPECT_GT(wait_still(), 0);
  EXPECT_TRUE(comes_true([&] { return wait_still() == 0; })) << "their turns come";
}

TEST_F(DataAcceptorInACrowd, FurtherOnesOfAHandshakeMakeRoomBeforeOlderConnections) {
  tcp::socket silent = stranger();
  std::vector<std::byte> said;
  std::vector<std::unique_ptr<Named>> further;
  while (refusals_->snapshot().empty()) {
    further.push_back(named(one_));
    ASSERT_LT(further.size(), 4096U);
    context_.poll();
  }
  EXPECT_FALSE(is_closed(silent, said));
  EXPECT_FALSE(is_closed(crowd_.front()->socket, said));
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
  std::size_t lost = 0;
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
    lost += std::size_t{is_closed(unlucky.back(), said)};

    // A handshake comes before a connection, and this one's hello is none, so it is let go as soon as it has come.
    (void)expect(std::chrono::hours(1));
    tcp::socket next(context_, tcp::v4());
    next.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    next.write_some(asio::buffer(std::array<char, sizeof(Hello)>{}));
    next.non_blocking(true);
    while (!is_closed(next, said)) {
      ASSERT_NE(context_.run_one_for(std::chrono::seconds(10)), 0U) << allocations;
    }
  }
  EXPECT_GT(lost, 2U);
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
    context_.run_one();
  }
  EXPECT_TRUE(said.empty());
}

}  // namespace
}  // namespace kvferry::tcp
