// SPDX-License-Identifier: Apache-2.0
// Regions that go: who is waited for.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/region_removals.hpp>
#include <kvferry/kit/region_table.hpp>

#include "common/allocation_limit.hpp"
#include "peers_regions.hpp"
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

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
      : TransferChannelKit(kvferry_test::patient(std::move(options))), link_(std::move(link)) {
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

}  // namespace
}  // namespace kvferry::kit::tests
