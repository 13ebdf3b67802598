// SPDX-License-Identifier: Apache-2.0
// Peers that are remembered, and handshakes that newer ones displace.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <latch>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

/// A channel that is asked by strangers, whose connections then don't come unless the test says so.
class Strangers : public ::testing::Test {
 protected:
  /// The channel's objects that are kept here go before its threads.
  ~Strangers() override {
    asking_.reset();
    if (hub_) {
      hub_->close();
      handlers_.clear();
      hosts_.clear();
    }
  }

  void make_hub(std::size_t max_peers) {
    ChannelOptions options;
    options.peer_init_url = kvferry::testing::own_loopback_url();
    options.max_peers = max_peers;
    hub_.emplace(options, [](const auto&) { return std::make_shared<KeepingLink>(); });
    hub_->when_accepting([this](std::shared_ptr<LinkHost> host, LinkHandler on_link) {
      const std::lock_guard lock(mutex_);
      hosts_.push_back(host);
      handlers_.push_back(std::move(on_link));
      host->when_abandoned([this, number = hosts_.size() - 1] {
        const std::lock_guard relock(abandoned_mutex_);
        abandoned_.push_back(number);
      });
    });
    asking_.emplace(ChannelOptions(), [](const auto&) { return std::make_shared<KeepingLink>(); });
  }

  /// Asks as a channel of this id and incarnation, in its attempt of this number. @return how that is answered.
  std::error_code ask_as(const std::string& id, std::uint64_t incarnation, std::optional<std::uint64_t> attempt = {}) {
    InitQuestion question;
    question.transport = "test";
    question.sender_id = id;
    question.receiver_id = "hub";
    question.incarnation = incarnation;
    question.secret = Bytes(16, static_cast<std::byte>(incarnation));
    question.attempt = attempt;
    std::error_code ec;
    asking_->send_init_side_msg(hub_->peer_init_url(), encode_side_message(question), {}, ec);
    return ec;
  }

  /// For whom the connection of a question is awaited: the questions have numbers from 0.
  std::shared_ptr<LinkHost> host(std::size_t number) {
    const std::lock_guard lock(mutex_);
    return hosts_.at(number);
  }
  /// Its connection comes, or doesn't.
  void connected(std::size_t number, const std::shared_ptr<Link>& link, std::error_code ec = {}) {
    LinkHandler on_link;
    {
      const std::lock_guard lock(mutex_);
      on_link = handlers_.at(number);
    }
    on_link(ec, link, "the test says so");
  }
  /// The peers whose connections are no longer awaited.
  std::vector<std::size_t> abandoned() {
    const std::lock_guard lock(abandoned_mutex_);
    return abandoned_;
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<LinkHost>> hosts_;
  std::vector<LinkHandler> handlers_;
  std::mutex abandoned_mutex_;
  std::vector<std::size_t> abandoned_;
  std::optional<TestChannel> asking_;
  std::optional<TestChannel> hub_;
};

TEST_F(Strangers, APeerThatIsAboutToBeConnectedAnewIsNotForgotten) {
  make_hub(1);
  ASSERT_FALSE(ask_as("p", 1));
  const auto link = std::make_shared<KeepingLink>();
  connected(0, link);
  ASSERT_TRUE(hub_->remote_xfer_handler_exists("p"));
  EXPECT_EQ(ask_as("q", 2), errc::resource_limit) << "it is connected";
  host(0)->link_failed(*link, errc::connection_lost);
  ASSERT_FALSE(ask_as("p", 3)) << "perhaps the same, perhaps another one of its name";
  EXPECT_EQ(ask_as("q", 4), errc::resource_limit) << "it is being connected to";
  connected(1, nullptr, errc::timed_out);
  EXPECT_FALSE(ask_as("q", 5)) << "nobody uses it any more";
}

TEST_F(Strangers, WhoAsksAgainTakesTheFirstQuestionsPlace) {
  make_hub(4);
  ASSERT_FALSE(ask_as("p", 1));
  ASSERT_FALSE(ask_as("p", 2));
  EXPECT_TRUE(abandoned().empty()) << "either may be the one";
  ASSERT_FALSE(ask_as("p", 2));
  EXPECT_EQ(abandoned(), std::vector<std::size_t>{1});
}

// They travel on connections of their own, and a peer that has given one up asks the next one at once.
TEST_F(Strangers, AQuestionThatWasOvertakenEndsNoLaterAttempt) {
  make_hub(4);
  ASSERT_FALSE(ask_as("p", 1, 12));
  EXPECT_EQ(ask_as("p", 1, 11), errc::peer_cancelled) << "of the peer's own attempt";
  ASSERT_FALSE(ask_as("p", 2, 8)) << "another channel counts for itself";
  EXPECT_EQ(ask_as("p", 2, 7), errc::peer_cancelled) << "of an attempt beside it";
  EXPECT_TRUE(abandoned().empty());
  connected(0, std::make_shared<KeepingLink>());
  ASSERT_TRUE(hub_->remote_xfer_handler_exists("p"));
  EXPECT_EQ(ask_as("p", 1, 11), errc::peer_cancelled) << "whose connection is there";
  ASSERT_FALSE(ask_as("p", 1, 13));
}

TEST_F(Strangers, OfMoreThanAFewWhoSayThatTheyAreOnePeerTheFirstGiveWay) {
  constexpr std::size_t candidates = 8;
  make_hub(64);
  for (std::uint64_t incarnation = 1; incarnation <= 1 + candidates; ++incarnation) {
    ASSERT_FALSE(ask_as("p", incarnation));
  }
  EXPECT_TRUE(abandoned().empty());
  ASSERT_FALSE(ask_as("p", 100));
  EXPECT_EQ(abandoned(), std::vector<std::size_t>{1}) << "the first one is the peer's own attempt, for all that is known";
  ASSERT_FALSE(ask_as("p", 101));
  EXPECT_EQ(abandoned(), (std::vector<std::size_t>{1, 2}));
  connected(1, std::make_shared<KeepingLink>());
  EXPECT_FALSE(hub_->remote_xfer_handler_exists("p")) << "its place was given to another";
  connected(candidates + 2, std::make_shared<KeepingLink>());
  EXPECT_TRUE(hub_->remote_xfer_handler_exists("p"));
}

TEST_F(Strangers, WhoAsksTwiceUnderEachOfManyIdsKeepsNobodyOut) {
  make_hub(8);  // six handshakes of strangers, five of them of one address
  for (std::uint64_t id = 0; id < 8; ++id) {
    ASSERT_FALSE(ask_as("p" + std::to_string(id), 1));
    ASSERT_FALSE(ask_as("p" + std::to_string(id), 2));
  }
  EXPECT_GE(abandoned().size(), 16U - 6U) << "as many as fit are awaited";
  EXPECT_FALSE(ask_as("newcomer", 3));
}

// The peer has it already, and may have begun something on it.
TEST(Dials, AConnectionThatIsBeingMadeIsKeptForTheNextCallWhenTheTimeOfTheFirstIsOver) {
  ChannelOptions listening;
  listening.peer_init_url = kvferry::testing::own_loopback_url();
  const auto keeping = [](const auto&) { return std::make_shared<KeepingLink>(); };
  constexpr std::chrono::milliseconds first_ones_time{50};
  for (bool was_in_time = false; !was_in_time;) {
    TestChannel b(listening, keeping);
    TestChannel a(ChannelOptions(), keeping);
    std::promise<LinkHandler> answered;
    a.when_dialing([&, first = true](const auto&, LinkHandler on_link) mutable {
      if (std::exchange(first, false)) {
        answered.set_value(std::move(on_link));
      } else {
        on_link({}, std::make_shared<KeepingLink>(), {});
      }
    });
    auto in_hand = answered.get_future();
    const auto begun = Clock::now();
    std::error_code ec;
    a.lazy_init_peer_connection("a", "b", b.peer_init_url(), {}, {.timeout = first_ones_time}, ec);
    ASSERT_EQ(ec, errc::timed_out);
    const bool has_answered = in_hand.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    auto next = a.async_lazy_init_peer_connection("a", "b", b.peer_init_url(), {}, {}, asio::use_future);
    const auto serve = [&] {
      if (in_hand.valid() && in_hand.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
        in_hand.get()({}, std::make_shared<KeepingLink>(), {});
      }
    };
    serve();
    was_in_time = has_answered && Clock::now() < begun + first_ones_time + longer_than_the_call;
    while (next.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready) {
      serve();  // the answer may come only now
    }
    EXPECT_NO_THROW(next.get());
    if (was_in_time) {
      EXPECT_EQ(a.dials(), 1);
    }
    a.close();
  }
}

/// Says whether it was used, and whether it was shut.
class StrangersLink final : public KeepingLink {
 public:
  [[nodiscard]] bool take_used() noexcept override { return was_used; }
  void shut(std::error_code cause, const std::string& why) override {
    shut_by = cause;
    KeepingLink::shut(cause, why);
  }

  bool was_used = false;
  std::error_code shut_by;
};

TEST_F(Strangers, ALinkThatWasNeverUsedGivesWayToANewerOne) {
  make_hub(8);
  std::vector<std::shared_ptr<StrangersLink>> links;
  const auto come = [&](const std::string& id) {
    links.push_back(std::make_shared<StrangersLink>());
    const auto ec = ask_as(id, links.size());
    if (!ec) {
      connected(hosts_.size() - 1, links.back());
    }
    return ec;
  };
  for (int i = 0; i < 6; ++i) {
    ASSERT_FALSE(come("p" + std::to_string(i)));
  }
  links[0]->was_used = true;
  EXPECT_FALSE(come("newcomer"));
  EXPECT_TRUE(hub_->remote_xfer_handler_exists("newcomer"));
  EXPECT_TRUE(hub_->remote_xfer_handler_exists("p0")) << "it is used";
  EXPECT_FALSE(hub_->remote_xfer_handler_exists("p1")) << "an address has three quarters, and it was the oldest";
  EXPECT_EQ(links[1]->shut_by, errc::resource_limit);
  EXPECT_TRUE(hub_->remote_xfer_handler_exists("p2"));
  for (const auto& link : links) {
    link->was_used = true;
  }
  EXPECT_EQ(come("too many"), errc::resource_limit);
  EXPECT_FALSE(ask_as("p3", 4)) << "it is connected, and connects again";
}

TEST_F(Strangers, ALinkThatComesWhenAllHaveBeenUsedMeanwhileIsRefused) {
  make_hub(4);
  std::vector<std::shared_ptr<StrangersLink>> links;
  for (std::size_t i = 0; i < 4; ++i) {
    links.push_back(std::make_shared<StrangersLink>());
    ASSERT_FALSE(ask_as("p" + std::to_string(i), i + 1));
    if (i < 3) {
      connected(i, links[i]);
    }
  }
  for (const auto& link : links) {
    link->was_used = true;
  }
  connected(3, links[3]);
  EXPECT_FALSE(hub_->remote_xfer_handler_exists("p3"));
  EXPECT_EQ(links[3]->shut_by, errc::resource_limit);
  EXPECT_TRUE(hub_->remote_xfer_handler_exists("p0"));
}

/// Is asked something by a thread that enters it into the channel's table.
class AskedLink final : public KeepingLink {
 public:
  [[nodiscard]] std::string remote_address() const override {
    asked.count_down();
    go_on.wait();
    return {};
  }

  mutable std::latch asked{1};
  mutable std::latch go_on{1};
};

TEST_F(Strangers, ClosingLastsUntilNobodyIsInTheTableOfPeers) {
  make_hub(1);
  ASSERT_FALSE(ask_as("p", 1));
  const auto link = std::make_shared<AskedLink>();
  // As a transport's own thread does that the channel does not wait for otherwise.
  auto entering = std::async(std::launch::async, [&] { connected(0, link); });
  link->asked.wait();
  auto closed = std::async(std::launch::async, [&] { hub_->close(); });
  EXPECT_EQ(closed.wait_for(std::chrono::milliseconds(100)), std::future_status::timeout);
  link->go_on.count_down();
  closed.get();
  entering.get();
}

}  // namespace
}  // namespace kvferry::kit::tests
