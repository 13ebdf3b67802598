// SPDX-License-Identifier: Apache-2.0
// Attempts that nobody wants any more, attempts that cross, and the errors that they end with.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/thread_pool.hpp>
#include <asio/use_future.hpp>

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/peer_event.hpp>

#include "auto_node.hpp"

namespace kvferry::inline KVFERRY_ABI::roads::testing {
namespace {

using std::chrono::milliseconds;

TEST(AutoAttempt, OneThatWasDroppedGoesOnOverNoOtherRoad) {
  const auto silent = std::make_shared<Fate>();
  const auto second = std::make_shared<Fate>();
  silent->set(Fate::State::silent);
  Node b;
  Node a(with({mortal_shm(silent), mortal_tcp("tcp", second)}));
  auto dropped = a.begin_connect(b);
  ASSERT_TRUE(comes_true([&] { return silent->waiting() == 1; }));
  a.channel->disconnect("b");
  a.channel->fence("b", long_enough);
  EXPECT_THROW((void)dropped.get(), std::system_error);
  auto wanted = a.begin_connect(b);
  ASSERT_TRUE(comes_true([&] { return silent->waiting() == 2; }));
  silent->run_out_of_time();
  EXPECT_NO_THROW((void)wanted.get());
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  a.channel->close();
  EXPECT_EQ(second->connects(), 1U);
  EXPECT_EQ(b.channel->wait_peer_event(long_enough).kind, PeerEventKind::connected);
  EXPECT_EQ(b.channel->wait_peer_event(long_enough).kind, PeerEventKind::gone);
  std::error_code ec;
  (void)b.channel->wait_peer_event(milliseconds(0), ec);
  EXPECT_EQ(ec, errc::timed_out) << "there was one connection";
}

/// Functions on an executor of the user may run late.
TEST(AutoAttempt, OneOfAClosedChannelGoesOnOverNoOtherRoad) {
  asio::thread_pool pool(1);
  const auto silent = std::make_shared<Fate>();
  const auto second = std::make_shared<Fate>();
  silent->set(Fate::State::silent);
  Node b;
  AutoOptions options = with({mortal_shm(silent), mortal_tcp("tcp", second)});
  options.executor = pool.get_executor();
  Node a(std::move(options));
  auto attempt = a.begin_connect(b);
  ASSERT_TRUE(comes_true([&] { return silent->waiting() == 1; }));
  HeldThread held(pool);
  silent->run_out_of_time();
  a.channel->close();
  held.let_go();
  EXPECT_THROW((void)attempt.get(), std::system_error);
  pool.join();
  EXPECT_EQ(second->connects(), 0U);
}

/// A peer that says that it is in a crowd: two have asked it, and don't go on.
class AutoAttemptAtACrowd : public ::testing::Test {
 protected:
  AutoAttemptAtACrowd() : b_(small()) {
    silent_->set(Fate::State::silent);
    for (const std::string own_id : {"one", "two"}) {
      waiting_.push_back(strangers_.channel->async_lazy_init_peer_connection(
          own_id, "b of " + own_id, b_.channel->peer_init_url(), {}, {}, asio::use_future));
    }
    EXPECT_TRUE(comes_true([this] { return silent_->waiting() == 2; }));
    closed_->set(Fate::State::unreachable);
    closed_->refuse_with(errc::peer_closed);
  }
  ~AutoAttemptAtACrowd() override {
    strangers_.channel->close();
    for (auto& call : waiting_) {
      EXPECT_THROW((void)call.get(), std::system_error);
    }
  }

  static AutoOptions small() {
    AutoOptions options = with({tcp_named("one"), tcp_named("other")});
    options.max_peers = 16;
    return options;
  }

  Node b_;
  const std::shared_ptr<Fate> silent_ = std::make_shared<Fate>();
  Node strangers_{with({mortal_tcp("one", silent_)})};
  std::vector<std::future<std::optional<SideMessage>>> waiting_;
  const std::shared_ptr<Fate> closed_ = std::make_shared<Fate>();
};

TEST_F(AutoAttemptAtACrowd, IsMadeAnewIfThePeerClosesItsConnection) {
  Node a(with({mortal_tcp("one", closed_)}));
  auto attempt = a.begin_connect(b_);
  EXPECT_TRUE(comes_true([&] { return closed_->connects() >= 3; }));
  closed_->set(Fate::State::alive);
  EXPECT_NO_THROW((void)attempt.get());
}

TEST_F(AutoAttemptAtACrowd, EndsWithWhatTryingAgainDoesNotMend) {
  const auto forged = std::make_shared<Fate>();
  forged->set(Fate::State::unreachable);
  forged->refuse_with(errc::authentication_failed);
  Node a(with({mortal_tcp("one", closed_), mortal_tcp("other", forged)}));
  EXPECT_EQ(a.connect(b_), errc::authentication_failed);
}

/// A call that the test cancels, on its own thread, as Asio wants it.
class Cancelled {
 public:
  [[nodiscard]] auto token() {
    return asio::bind_cancellation_slot(
        signal_.slot(), asio::bind_executor(loop_, [this](std::error_code ec, const auto&) { ended_ = ec; }));
  }
  /// @return what it ended with.
  [[nodiscard]] std::error_code cancel() {
    signal_.emit(asio::cancellation_type::terminal);
    const auto until = std::chrono::steady_clock::now() + long_enough;
    while (!ended_ && loop_.run_one_until(until) != 0) {
    }
    return ended_.value_or(std::error_code());
  }

 private:
  asio::io_context loop_;
  asio::cancellation_signal signal_;
  std::optional<std::error_code> ended_;
};

void begin_connect(Node& from, const Node& to, Cancelled& call) {
  from.channel->async_lazy_init_peer_connection("a", "b", to.channel->peer_init_url(), {}, {}, call.token());
}

/// A connect that waits at a silent road, and behind it another road.
class CancelledConnects : public ::testing::Test {
 protected:
  void SetUp() override {
    silent_->set(Fate::State::silent);
    begin_connect(a_, b_, first_);
    ASSERT_TRUE(comes_true([&] { return silent_->waiting() == 1; }));
  }
  /// Of the attempt that was cancelled.
  void expect_that_nobody_joins_it() {
    auto wanted = a_.begin_connect(b_);
    ASSERT_TRUE(comes_true([&] { return silent_->waiting() == 2; })) << "joined the one that nobody wanted any more";
    silent_->run_out_of_time();
    EXPECT_NO_THROW((void)wanted.get());
    EXPECT_EQ(second_->connects(), 1U);
  }

  const std::shared_ptr<Fate> silent_ = std::make_shared<Fate>();
  const std::shared_ptr<Fate> second_ = std::make_shared<Fate>();
  Node b_;
  Node a_{with({mortal_shm(silent_), mortal_tcp("tcp", second_)})};
  Cancelled first_;
};

TEST_F(CancelledConnects, GoOnOverNoOtherRoad) {
  EXPECT_EQ(first_.cancel(), errc::cancelled);
  expect_that_nobody_joins_it();
}

TEST_F(CancelledConnects, GoOnForWhoElseWaits) {
  auto wanted = a_.begin_connect(b_);
  Cancelled last;
  begin_connect(a_, b_, last);
  EXPECT_EQ(first_.cancel(), errc::cancelled);
  EXPECT_EQ(last.cancel(), errc::cancelled);
  silent_->run_out_of_time();
  EXPECT_NO_THROW((void)wanted.get());
  EXPECT_EQ(silent_->connects(), 1U) << "the dial was ended, and begun anew";
}

/// The dial has the time of the one with more.
TEST_F(CancelledConnects, EndWhenAllHaveLeftInTheirWays) {
  auto hasty = a_.channel->async_lazy_init_peer_connection("a", "b", b_.channel->peer_init_url(), {},
                                                           {milliseconds(100), nullptr}, asio::use_future);
  EXPECT_EQ(first_.cancel(), errc::cancelled);
  try {
    (void)hasty.get();
    ADD_FAILURE() << "connected over a silent road";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::timed_out);
  }
  expect_that_nobody_joins_it();
}

TEST(AutoAttempt, AnOperationThatWasCancelledReconnectsNobody) {
  const auto fate = std::make_shared<Fate>();
  Node b;
  Node a(with({mortal_shm(fate), tcp()}));
  ASSERT_FALSE(a.connect(b));
  fate->set(Fate::State::silent);
  fate->break_links();
  const std::vector<ConstBuffer> objects{a.at(0)};
  const std::vector<std::uint64_t> first{0};
  std::vector<std::unique_ptr<Cancelled>> calls;
  for (int i = 0; i < 3; ++i) {
    calls.push_back(std::make_unique<Cancelled>());
    a.channel->async_batched_write(objects, {.peer_id = "b", .remote_indexes = first}, calls.back()->token());
  }
  ASSERT_TRUE(comes_true([&] { return fate->waiting() == 1; }));
  for (const auto& call : calls) {
    EXPECT_EQ(call->cancel(), errc::cancelled);
  }
  auto wanted = a.begin_connect(b);
  ASSERT_TRUE(comes_true([&] { return fate->waiting() == 2; })) << "joined the one that nobody wanted any more";
  fate->run_out_of_time();
  EXPECT_NO_THROW((void)wanted.get());
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
}

/// Channels whose first road has much time, like the attempt, and is silent.
class FencesOfSilentRoads : public ::testing::Test {
 protected:
  static constexpr std::chrono::minutes much_time{10};
  /// More than a fence waits where nothing else is to be tried.
  static constexpr milliseconds some_time{1500};

  [[nodiscard]] static AutoOptions with_much_time(std::vector<AutoRoad> roads) {
    AutoOptions options = with(std::move(roads));
    options.road_timeout = much_time;
    options.handshake_timeout = 3 * much_time;
    return options;
  }
  void SetUp() override {
    silent_->set(Fate::State::silent);
    connecting_ = a_.begin_connect(b_);
    ASSERT_TRUE(comes_true([&] { return silent_->waiting() == 1; }));
  }
  void expect_that_a_fence_waits(Node& node, const std::string& peer) {
    auto fence = node.channel->async_fence(peer, much_time, asio::use_future);
    (void)fence.wait_for(some_time);
    silent_->run_out_of_time();
    EXPECT_NO_THROW((void)connecting_.get());
    EXPECT_NO_THROW(fence.get());
    EXPECT_EQ(silent_->connects(), 1U) << "the attempt was given up, and begun anew";
    EXPECT_TRUE(begins(a_.path_to("b"), "tcp ")) << a_.path_to("b");
    EXPECT_FALSE(a_.write(1));
  }

  const std::shared_ptr<Fate> silent_ = std::make_shared<Fate>();
  Node b_{with_much_time({shm(), tcp()})};
  Node a_{with_much_time({mortal_shm(silent_), tcp()})};
  std::future<std::optional<SideMessage>> connecting_;
};

TEST_F(FencesOfSilentRoads, OneOfThePeersWaitsForTheRoadBehindIt) { expect_that_a_fence_waits(b_, "a"); }

TEST_F(FencesOfSilentRoads, OneOfTheDialingSideWaitsForTheRoadBehindIt) { expect_that_a_fence_waits(a_, "b"); }

TEST_F(FencesOfSilentRoads, OneEndsInItsTimeAllTheSame) {
  EXPECT_NO_THROW(b_.channel->fence("a", milliseconds(20)));
  silent_->run_out_of_time();
  EXPECT_THROW((void)connecting_.get(), std::system_error) << "the peer doesn't await it any more";
}

/// Why no better road was taken, though none behind them answers.
TEST(AutoAttempt, ASilentLastRoadIsNamedAndSoAreTheReasonsOfThoseBefore) {
  const auto fate = std::make_shared<Fate>();
  const auto silent = std::make_shared<Fate>();
  Node b(with({shm(), tcp_named("first"), tcp_named("last")}));
  Node a(with({mortal_shm(fate), mortal_tcp("first", fate), mortal_tcp("last", silent)}));
  ASSERT_FALSE(a.connect(b));
  fate->set(Fate::State::unreachable);
  silent->set(Fate::State::silent);
  fate->break_links();
  const std::string refused = "nobody is there: Connection refused";
  const std::string at =
      "the data connection was not welcomed: road last; not shm: " + refused + "; not first: " + refused;
  std::string diagnostic;
  std::error_code ec;
  // In so little time it may not have come to the last road, or to any answer: then it gets more.
  milliseconds given{0};
  const auto comes_to_the_last = [&](const auto& call) {
    for (given = milliseconds(100); given < long_enough; given *= 2) {
      call();
      if (has(diagnostic, "road last")) {
        return true;
      }
    }
    return false;
  };
  EXPECT_TRUE(comes_to_the_last([&] { ec = a.connect(b, &diagnostic, given); })) << diagnostic;
  EXPECT_EQ(ec, errc::timed_out);
  EXPECT_TRUE(has(diagnostic, "within the " + std::to_string(given.count()) + " ms that the call was given: " + at))
      << diagnostic;
  const std::vector<ConstBuffer> objects{a.at(0)};
  const std::vector<std::uint64_t> index{0};
  EXPECT_TRUE(comes_to_the_last([&] {
    (void)a.channel->batched_write(
        objects, {.peer_id = "b", .remote_indexes = index, .timeout = given, .diagnostic = &diagnostic}, ec);
  })) << diagnostic;
  EXPECT_EQ(ec, errc::timed_out);
  EXPECT_TRUE(has(diagnostic, "the deadline passed: " + at)) << diagnostic;
}

/// However much time the attempt has: who joins it may have less.
TEST(AutoAttempt, ASilentRoadHasItsTimeout) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::silent);
  AutoOptions other;
  other.handshake_timeout = std::chrono::hours(1);
  Node b(std::move(other));
  AutoOptions options = with({mortal_shm(fate), tcp()});
  options.road_timeout = milliseconds(50);
  Node a(std::move(options));
  auto first = a.channel->async_lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {},
                                                          {std::chrono::hours(1), nullptr}, asio::use_future);
  EXPECT_FALSE(a.connect(b, nullptr, long_enough)) << "half an hour is not over";
  EXPECT_NO_THROW((void)first.get());
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
}

/// @param shm, first, second what roads of these names end with.
[[nodiscard]] std::error_code error_of(std::error_code shm, std::error_code first, std::error_code second) {
  std::vector<std::shared_ptr<Fate>> fates;
  for (const auto& cause : {shm, first, second}) {
    fates.push_back(std::make_shared<Fate>());
    fates.back()->set(Fate::State::unreachable);
    fates.back()->refuse_with(cause);
  }
  Node b(with({testing::shm(), tcp_named("first"), tcp_named("second")}));
  Node a(with({mortal_shm(fates[0]), mortal_tcp("first", fates[1]), mortal_tcp("second", fates[2])}));
  return a.connect(b);
}

TEST(AutoAttempt, EndsWithWhatTryingAgainDoesNotMend) {
  const auto refused = std::make_error_code(std::errc::connection_refused);
  EXPECT_EQ(error_of(refused, refused, refused), errc::no_path);
  EXPECT_EQ(error_of(refused, errc::malformed_message, refused), errc::malformed_message);
  EXPECT_EQ(error_of(refused, refused, errc::malformed_message), errc::malformed_message);
  EXPECT_EQ(error_of(refused, refused, errc::timed_out), errc::timed_out);
  EXPECT_EQ(error_of(errc::authentication_failed, refused, refused), errc::no_path) << "TCP may come back";
}

TEST(AutoAttempt, ThePeersReasonsHaveTheirCodes) {
  const KeyPair keys = make_key_pair();
  const auto keyring =
      std::make_shared<Keyring>(keys, std::vector<PeerKey>{{std::string(PeerKey::any_id), keys.public_key}});
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  TcpOptions off;
  off.encryption = Encryption::off;
  AutoOptions plain = with({shm(), road<TcpTransferChannel>("tcp", off)});
  plain.keyring = keyring;
  plain.allow_unencrypted = true;
  AutoOptions encrypting = with({mortal_shm(fate), tcp()});
  encrypting.keyring = keyring;
  Node b(std::move(plain));
  Node a(std::move(encrypting));
  EXPECT_EQ(a.connect(b), errc::encryption_mismatch) << "rather than no_path, which may be tried again";
}

TEST(AutoAttempt, TwoThatConnectAtOnceUseOneRoad) {
  Node b(with({tcp(), shm()}));
  Node a(with({shm(), tcp()}));
  auto there = a.begin_connect(b);
  auto back =
      b.channel->async_lazy_init_peer_connection("b", "a", a.channel->peer_init_url(), {}, {}, asio::use_future);
  EXPECT_NO_THROW((void)there.get());
  EXPECT_NO_THROW((void)back.get());
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  EXPECT_FALSE(b.write(5, "a"));
  EXPECT_TRUE(a.holds(5));
  EXPECT_TRUE(comes_true([&] { return a.path_to("b").substr(0, 4) == b.path_to("a").substr(0, 4); }))
      << a.path_to("b") << " but " << b.path_to("a");
}

TEST(AutoAttempt, WarningsOfAWorseRoadAreNotLostAmongRecordsOfTheBest) {
  constexpr int more_than_the_log_takes = 12;
  const auto fate = std::make_shared<Fate>();
  Node b;
  AutoOptions options = with({mortal_shm(fate), tcp()});
  options.log_level = LogLevel::info;
  Node a(std::move(options));
  for (int i = 0; i < more_than_the_log_takes; ++i) {
    ASSERT_FALSE(a.connect(b));
    a.channel->disconnect("b");
  }
  fate->set(Fate::State::unreachable);
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(a.warned("path_chosen: road tcp; not shm: nobody is there"));
  const auto roads = a.channel->stats().roads;
  ASSERT_EQ(roads.size(), 2U);
  EXPECT_EQ(roads[0].name, "shm");
  EXPECT_EQ(roads[0].taken, static_cast<std::uint64_t>(more_than_the_log_takes));
  EXPECT_EQ(roads[0].fallbacks, 0U);
  EXPECT_EQ(roads[1].taken, 1U);
  EXPECT_EQ(roads[1].fallbacks, 1U);
}

}  // namespace
}  // namespace kvferry::roads::testing
