// SPDX-License-Identifier: Apache-2.0
// Regions that come and go: their numbers, who is waited for when one goes, and who waits for one that is not known yet.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/region_removals.hpp>
#include <kvferry/kit/region_table.hpp>
#include "common/allocation_limit.hpp"
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

std::byte some_memory[64];
const MemoryRegion some_region{some_memory, sizeof(some_memory), 16, Access::read_write};

std::uint32_t add_to(RegionTable& table) {
  return table.add(some_region, [](const LocalRegion&) {});
}

TEST(RegionTable, ANumberIsGivenOnceAndWhatWasRemovedTakesNoMemory) {
  RegionTable table(std::vector<MemoryRegion>(2, some_region));
  const auto given = table.now();
  EXPECT_FALSE(given->outdated());
  EXPECT_EQ(given->refusal(2), errc::unknown_region);
  errc refusal{};
  for (std::uint32_t number = 2; number < 100'002; ++number) {
    ASSERT_EQ(add_to(table), number);
    ASSERT_TRUE(table.remove(number, refusal).has_value());
    table.gone();
  }
  const auto now = table.now();
  EXPECT_EQ(now->all().size(), 2U);
  EXPECT_EQ(now->refusal(100'001), errc::region_gone);
  EXPECT_EQ(now->refusal(100'002), errc::unknown_region);
  EXPECT_TRUE(given->outdated());
  EXPECT_NE(given->find(1), nullptr) << "who has the list keeps it as it was";
  EXPECT_FALSE(table.remove(2, refusal).has_value());
  EXPECT_EQ(refusal, errc::region_gone);
  EXPECT_FALSE(table.remove(100'002, refusal).has_value());
  EXPECT_EQ(refusal, errc::unknown_region);
}

TEST(RegionTable, ThoseThatAreBeingRemovedCount) {
  RegionTable table(std::vector<MemoryRegion>(RegionTable::max_regions, some_region));
  const auto refused = [&] {
    try {
      (void)add_to(table);
    } catch (const TransferError& error) {
      return error.code();
    }
    return std::error_code();
  };
  EXPECT_EQ(refused(), errc::resource_limit);
  errc refusal{};
  ASSERT_TRUE(table.remove(7, refusal).has_value());
  EXPECT_EQ(refused(), errc::resource_limit);
  table.gone();
  EXPECT_FALSE(refused());
  EXPECT_EQ(refused(), errc::resource_limit);
  EXPECT_EQ(table.now()->find(7), nullptr);
  EXPECT_EQ(table.now()->find(8)->number, 8U);
}

TEST(RegionTable, WhatCannotBeEnteredIsUndone) {
  RegionTable table({});
  std::vector<std::uint32_t> prepared;
  std::vector<std::uint32_t> undone;
  prepared.reserve(1);
  undone.reserve(1);
  EXPECT_THROW(table.add(
                   some_region,
                   [&](const LocalRegion& added) {
                     prepared.push_back(added.number);
                     test::allocations_left = 0;
                   },
                   [&](const LocalRegion& added) {
                     test::allocations_left = test::unlimited_allocations;
                     undone.push_back(added.number);
                   }),
               std::bad_alloc);
  test::allocations_left = test::unlimited_allocations;
  EXPECT_EQ(undone, prepared);
  EXPECT_TRUE(table.now()->all().empty());
  EXPECT_EQ(add_to(table), 0U);
}

TEST(RegionTable, WhatCannotBeMadeReadyHasNoNumber) {
  RegionTable table({});
  EXPECT_THROW(table.add(some_region, [](const LocalRegion&) { throw std::runtime_error("no"); }), std::runtime_error);
  EXPECT_TRUE(table.now()->all().empty());
  EXPECT_EQ(add_to(table), 0U);
}

/// A link that answers when the test says so.
class RegionsLink final : public KeepingLink {
 public:
  explicit RegionsLink(bool can_ask = true) : can_ask_(can_ask) {}

  [[nodiscard]] bool region_removed(std::uint32_t number, std::function<void()> done) override {
    removed.push_back(number);
    if (when_asked) {
      when_asked();
    }
    if (can_ask_) {
      answers.push_back(std::move(done));
    }
    if (has_been_asked) {
      has_been_asked();  // another thread may shut the link from here on
    }
    return can_ask_;
  }
  void ask_regions(std::function<void()> done) override { questions.push_back(std::move(done)); }
  void stop(std::shared_ptr<Operation>) override {
    ++stops;
    if (when_stopped) {
      when_stopped();
    }
  }
  void shut(std::error_code cause, const std::string& why) override {
    shut_for = cause;
    for (const auto& answer : std::exchange(answers, {})) {
      answer();
    }
    KeepingLink::shut(cause, why);
  }

  std::vector<std::uint32_t> removed;
  std::vector<std::function<void()>> answers;
  std::vector<std::function<void()>> questions;
  std::error_code shut_for;
  std::function<void()> when_asked;
  std::function<void()> has_been_asked;
  std::function<void()> when_stopped;
  int stops = 0;

 private:
  const bool can_ask_;
};

/// A table of peers without a channel, to which "p" connects with a region of its own. The test runs its timers.
class PeersRegions : public ::testing::Test {
 protected:
  PeersRegions() { directory_->use(service_, {}); }
  ~PeersRegions() override {
    operations_->close(errc::closed);
    directory_->close();
    service_.close();
  }

  void connect(const std::shared_ptr<Link>& link) {
    link_ = link;
    InitQuestion question;
    question.transport = "test";
    question.sender_id = "p";
    question.receiver_id = "here";
    question.incarnation = 2;
    question.regions = {{64, 16, 3}};
    directory_->answer(encode_side_message(question), HandshakeService::Reply(nullptr));
    ASSERT_TRUE(directory_->usable("p"));
  }

  /// A write of one object, to the peer's region of this number.
  std::shared_ptr<Operation> start(std::uint32_t number) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "p";
    request.objects = {MutableBuffer(some_memory, 16)};
    request.remote_indexes = {0};
    request.remote_region = number;
    auto operation = std::make_shared<Operation>(
        std::move(request), Completion::direct([this](std::error_code ec, std::size_t) { ends_.push_back(ec); }),
        Clock::now() + std::chrono::hours(1), operations_);
    EXPECT_FALSE(operations_->add(operation));
    directory_->route(operation);
    return operation;
  }

  /// Takes this side's region 0 back.
  void remove(std::chrono::milliseconds timeout, std::vector<std::error_code>& ends) {
    removals_->remove(0, Clock::now() + timeout,
                      RemoveRegionCompletion::direct([&ends](std::error_code ec) { ends.push_back(ec); }), directory_);
  }

  [[nodiscard]] bool finished(const std::vector<std::error_code>& ends) {
    return run_until([&] { return !ends.empty(); });
  }

  /// Runs what is due until `done()`.
  template <class Done>
  [[nodiscard]] bool run_until(Done done) {
    const auto limit = Clock::now() + std::chrono::seconds(20);
    while (!done() && Clock::now() < limit) {
      context_.restart();
      (void)context_.run_one_for(std::chrono::milliseconds(20));
    }
    return done();
  }

  asio::io_context context_;
  const ChannelOptions options_;
  const std::shared_ptr<RegionTable> table_ = std::make_shared<RegionTable>(std::vector<MemoryRegion>(2, some_region));
  const std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  const std::shared_ptr<OperationRegistry> operations_ = std::make_shared<OperationRegistry>(deadlines_, 16);
  std::vector<std::uint32_t> forgotten_;
  const std::shared_ptr<RegionRemovals> removals_ =
      std::make_shared<RegionRemovals>(table_, operations_, deadlines_, context_.get_executor(),
                                       [this](std::uint32_t number) { forgotten_.push_back(number); });
  std::shared_ptr<Link> link_;
  std::shared_ptr<LinkHost> host_;
  std::vector<std::error_code> ends_;
  HandshakeService service_{{}, [](const SideMessage&, const HandshakeService::Reply&) {}};
  const std::shared_ptr<PeerDirectory> directory_ = std::make_shared<PeerDirectory>(
      options_, table_, 1,
      TransportHooks{"test", true, [](const std::string&) { return std::make_unique<NoDial>(); },
                     [this](std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point, LinkHandler on_link) {
                       host_ = std::move(host);
                       on_link({}, link_, {});
                       return Bytes();
                     },
                     [](const std::string&, std::size_t, const std::function<void()>& answer) {
                       answer();
                       return true;
                     }},
      deadlines_, std::make_shared<NotificationQueue>(deadlines_, NotificationQueue::Bounds{16, 4096, 4096}),
      std::make_shared<PeerEvents>(deadlines_, 16), operations_, std::make_shared<Logger>());
};

TEST_F(PeersRegions, ARemovalEndsWhenTheLinkHasAnsweredAndTheTransportHasForgotten) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  remove(std::chrono::hours(1), ends);  // joins
  EXPECT_EQ(link->removed, std::vector<std::uint32_t>{0});
  EXPECT_EQ(table_->now()->find(0), nullptr);
  EXPECT_TRUE(ends.empty());
  EXPECT_TRUE(forgotten_.empty());
  link->answers.front()();
  ASSERT_TRUE(run_until([&] { return ends.size() == 2; }));
  EXPECT_EQ(ends, std::vector<std::error_code>(2));
  EXPECT_EQ(forgotten_, std::vector<std::uint32_t>{0});
  EXPECT_FALSE(link->shut_for);
  remove(std::chrono::hours(1), ends);
  EXPECT_EQ(ends.back(), errc::region_gone);
}

TEST_F(PeersRegions, ARemovalWaitsForOperationsOfThisSideInTheRegion) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto under_way = start(0);
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  link->answers.front()();
  EXPECT_FALSE(under_way->finished());
  EXPECT_TRUE(ends.empty());
  link->end_all({}, {});
  ASSERT_TRUE(run_until([&] { return !ends.empty(); }));
  EXPECT_FALSE(ends.front());
}

TEST_F(PeersRegions, ALinkThatDoesNotAnswerInTimeOrCannotAskIsBroken) {
  for (const bool can_ask : {true, false}) {
    const auto link = std::make_shared<RegionsLink>(can_ask);
    connect(link);
    const std::uint32_t number = can_ask ? 0 : 1;
    std::vector<std::error_code> ends;
    removals_->remove(number, Clock::now() + std::chrono::milliseconds(can_ask ? 10 : 3'600'000),
                      RemoveRegionCompletion::direct([&ends](std::error_code ec) { ends.push_back(ec); }), directory_);
    ASSERT_TRUE(run_until([&] { return !ends.empty(); }));
    EXPECT_FALSE(ends.front());
    EXPECT_EQ(link->shut_for, errc::connection_lost);
    EXPECT_FALSE(directory_->usable("p"));
  }
}

TEST_F(PeersRegions, NobodyHasToRunTheExecutorOnceTheChannelIsClosed) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  operations_->close(errc::closed);
  directory_->close();
  EXPECT_TRUE(ends.empty());
  removals_->close();
  EXPECT_EQ(ends, std::vector<std::error_code>(1)) << "whoever waits for it does so for good";
  EXPECT_EQ(forgotten_, std::vector<std::uint32_t>{0});
  context_.restart();
  (void)context_.run_for(std::chrono::milliseconds(1));
  EXPECT_EQ(forgotten_.size(), 1U) << "what was posted ran as well";
}

TEST_F(PeersRegions, AnAnswerThatIsLostWhileTheChannelIsClosedIsNotWaitedFor) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  link->answers.clear();
  operations_->close(errc::closed);
  directory_->close();
  EXPECT_TRUE(ends.empty());
  removals_->close();
  deadlines_->close();
  EXPECT_EQ(ends, std::vector<std::error_code>(1));
  EXPECT_EQ(forgotten_, std::vector<std::uint32_t>{0});
}

TEST_F(PeersRegions, ARemovalThatComesWhileTheChannelIsClosedWaitsForThat) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  operations_->close(errc::closed);
  directory_->close();
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  EXPECT_TRUE(ends.empty()) << "perhaps not all links have been shut";
  EXPECT_TRUE(forgotten_.empty());
  removals_->close();
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends.front(), errc::closed);
  EXPECT_EQ(forgotten_, std::vector<std::uint32_t>{0});
  removals_->remove(1, Clock::now() + std::chrono::hours(1),
                    RemoveRegionCompletion::direct([&ends](std::error_code ec) { ends.push_back(ec); }), directory_);
  EXPECT_EQ(ends.size(), 2U);
}

/// A transport whose regions change, and which has something to forget with each.
class RegionsChannel final : public TransferChannelKit {
 public:
  RegionsChannel(ChannelOptions options, std::shared_ptr<Link> link)
      : TransferChannelKit(std::move(options)), link_(std::move(link)) {
    start();
  }
  RegionsChannel(const RegionsChannel&) = delete;
  RegionsChannel& operator=(const RegionsChannel&) = delete;
  ~RegionsChannel() override {
    close();
    run_handlers_left();
  }

  [[nodiscard]] std::string_view transport() const noexcept override { return "test"; }
  [[nodiscard]] Capabilities capabilities() const noexcept override {
    Capabilities all;
    all.region_changes = true;
    return all;
  }

 protected:
  [[nodiscard]] std::unique_ptr<Dial> dial(const std::string&) override { return std::make_unique<NoDial>(); }
  [[nodiscard]] Bytes accept(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler on_link) override {
    on_link({}, link_, {});
    return {};
  }
  [[nodiscard]] std::function<void(std::uint32_t)> region_forgetter() override {
    return [](std::uint32_t) {};
  }

 private:
  const std::shared_ptr<Link> link_;
};

TEST(RegionsOfAChannel, AnExecutorThatNobodyRunsAnyMoreKeepsNobodyWaiting) {
  asio::io_context context;
  std::promise<void> closed;
  std::promise<void> asked;
  const auto link = std::make_shared<RegionsLink>();
  link->has_been_asked = [&] { asked.set_value(); };
  ChannelOptions options;
  options.executor = context.get_executor();
  options.regions = {some_region};
  options.peer_init_url = kvferry::testing::own_loopback_url();
  RegionsChannel channel(options, link);
  asio::io_context others;
  options.executor = others.get_executor();
  TestChannel peer(options, [](const auto&) { return std::make_shared<KeepingLink>(); });
  peer.lazy_init_peer_connection("p", "here", channel.peer_init_url());
  // It runs until the channel is closed, and has no time for anything else before.
  asio::post(context, [&] {
    closed.get_future().wait();
    context.stop();
  });
  auto runs = std::async(std::launch::async, [&] { context.run(); });
  auto removed = std::async(std::launch::async, [&] {
    std::error_code ec;
    channel.remove_region(0, {}, ec);
    return ec;
  });
  asked.get_future().wait();
  channel.close();
  closed.set_value();
  runs.get();
  if (removed.wait_for(std::chrono::seconds(20)) != std::future_status::ready) {
    context.restart();
    (void)context.run();  // or the test doesn't end either
    ADD_FAILURE() << "whoever waits does so for good";
  }
  EXPECT_FALSE(removed.get());
}

TEST_F(PeersRegions, ATimeThatIsOverBeforeTheLinkIsAskedIsOverAllTheSame) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto under_way = start(0);
  link->when_asked = [this] {
    context_.restart();
    context_.run_for(std::chrono::milliseconds(50));
  };
  std::vector<std::error_code> ends;
  remove(std::chrono::milliseconds(-1), ends);
  ASSERT_TRUE(finished(ends));
  EXPECT_FALSE(ends.front());
  EXPECT_EQ(link->shut_for, errc::connection_lost);
  EXPECT_TRUE(under_way->finished());
}

TEST_F(PeersRegions, ACancelledWaitLeavesItsDeadlineToTheRemoval) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  asio::cancellation_signal signal;
  std::vector<std::error_code> ends;
  removals_->remove(0, Clock::now() + std::chrono::milliseconds(20),
                    RemoveRegionCompletion(asio::bind_cancellation_slot(
                                               signal.slot(), [&ends](std::error_code ec) { ends.push_back(ec); }),
                                           context_.get_executor()),
                    directory_);
  signal.emit(asio::cancellation_type::terminal);
  ASSERT_TRUE(finished(ends));
  EXPECT_EQ(ends.front(), errc::cancelled);
  ASSERT_TRUE(run_until([&] { return !forgotten_.empty(); })) << "the region is in use for good";
  EXPECT_EQ(link->shut_for, errc::connection_lost);
}

TEST_F(PeersRegions, OperationsThatWereStartedLaterGoOn) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  (void)start(0);
  std::vector<std::error_code> ends;
  remove(std::chrono::milliseconds(20), ends);
  link->answers.front()();
  const auto later = start(0);
  link->when_stopped = [&] { link->end_all(errc::cancelled, {}); };
  ASSERT_TRUE(run_until([&] { return link->stops != 0; }));
  EXPECT_EQ(link->stops, 1) << "one of them had been started before";
  EXPECT_FALSE(later->stop_cause());
  ASSERT_TRUE(finished(ends));
}

TEST_F(PeersRegions, AnAnswerThatALinkLosesIsMadeUpForByBreakingTheLink) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  link->answers.clear();
  ASSERT_TRUE(finished(ends));
  EXPECT_FALSE(ends.front());
  EXPECT_EQ(link->shut_for, errc::connection_lost);
}

TEST_F(PeersRegions, ALinkThatFailsToAskIsBroken) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  link->when_asked = [] { throw std::bad_alloc(); };
  std::vector<std::error_code> ends;
  remove(std::chrono::hours(1), ends);
  ASSERT_TRUE(finished(ends));
  EXPECT_FALSE(ends.front());
  EXPECT_EQ(link->shut_for, errc::connection_lost);
}

TEST_F(PeersRegions, WithoutMemoryARemovalHasNotBeenOrGoesOnWithTheNextCall) {
  std::size_t limit = 0;
  forgotten_.reserve(1000);
  bool refused = true;
  for (std::uint32_t number = 0; refused; number = add_to(*table_)) {
    const auto link = std::make_shared<RegionsLink>();
    connect(link);
    std::vector<std::error_code> ends;
    ends.reserve(2);
    const auto removed = [&](std::size_t allocations) {
      auto completion = RemoveRegionCompletion::direct([&ends](std::error_code ec) { ends.push_back(ec); });
      test::allocations_left = allocations;
      try {
        removals_->remove(number, Clock::now() + std::chrono::hours(1), std::move(completion), directory_);
      } catch (const std::bad_alloc&) {
        ends.push_back(std::make_error_code(std::errc::not_enough_memory));  // before there was a call to be ended
      }
      test::allocations_left = test::unlimited_allocations;
      for (const auto& answer : std::exchange(link->answers, {})) {
        answer();
      }
      EXPECT_TRUE(finished(ends)) << "allocation " << limit;
      return !ends.empty() && !std::exchange(ends, {}).front();
    };
    test::allocation_refused = false;
    const bool at_once = removed(limit++);
    refused = test::allocation_refused;
    EXPECT_TRUE(at_once || removed(test::unlimited_allocations)) << "allocation " << limit;
    EXPECT_EQ(table_->now()->find(number), nullptr);
    ASSERT_FALSE(forgotten_.empty());
    EXPECT_EQ(forgotten_.back(), number);
    link->shut(errc::closed, {});
    host_->link_failed(*link, errc::closed);
  }
}

TEST_F(PeersRegions, AnUnknownOneIsAskedForOnceAndNewsOfItLetTheOperationGoOn) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto first = start(1);
  const auto second = start(2);
  ASSERT_EQ(link->questions.size(), 1U) << "one question at a time";
  ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, 1}));
  ASSERT_TRUE(host_->peer_region_added({32, 16, Access::write, 1})) << "no news";
  link->questions[0]();
  ASSERT_TRUE(run_until([&] { return link->questions.size() == 2; }));
  EXPECT_TRUE(ends_.empty()) << "the first one is with the link";
  link->questions[1]();
  ASSERT_TRUE(run_until([&] { return !ends_.empty(); }));
  EXPECT_EQ(ends_, std::vector<std::error_code>{errc::unknown_region});
  EXPECT_FALSE(first->finished());
  EXPECT_TRUE(second->finished());
  host_->peer_region_removed(1);
  host_->peer_region_removed(1);
  ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, 1})) << "late, on another connection of the link";
  (void)start(1);
  EXPECT_EQ(ends_.back(), errc::region_gone);
  const auto info = directory_->info("p");
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->regions, (std::vector<RemoteRegion>{{64, 16, Access::read_write, 0}}));
  link->end_all({}, {});
}

TEST_F(PeersRegions, AQuestionThatTheLinkHasDroppedIsAskedAgain) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  (void)start(1);
  ASSERT_EQ(link->questions.size(), 1U);
  const auto begun = Clock::now();
  ASSERT_TRUE(run_until([&] { return Clock::now() - begun > std::chrono::milliseconds(1100); }));
  (void)start(1);
  ASSERT_EQ(link->questions.size(), 2U);
  link->questions[1]();
  ASSERT_TRUE(run_until([&] { return ends_.size() == 2; }));
  EXPECT_EQ(ends_, std::vector<std::error_code>(2, errc::unknown_region));
}

TEST_F(PeersRegions, WhoAskedOnALinkThatBreaksIsNotLost) {
  const auto link = std::make_shared<RegionsLink>();
  connect(link);
  const auto asks = start(1);
  host_->link_failed(*link, errc::connection_lost);
  ASSERT_TRUE(run_until([&] { return !ends_.empty(); }));
  EXPECT_EQ(ends_, std::vector<std::error_code>{errc::connection_lost}) << "the peer's init url is not known";
}

TEST_F(PeersRegions, APeerHasNoMoreThanItMay) {
  connect(std::make_shared<RegionsLink>());
  for (std::uint32_t number = 1; number < RegionTable::max_regions; ++number) {
    ASSERT_TRUE(host_->peer_region_added({64, 16, Access::write, number}));
  }
  EXPECT_FALSE(host_->peer_region_added({64, 16, Access::write, RegionTable::max_regions}));
  host_->peer_region_removed(5);
  EXPECT_TRUE(host_->peer_region_added({64, 16, Access::write, RegionTable::max_regions}));
}

}  // namespace
}  // namespace kvferry::kit::tests
