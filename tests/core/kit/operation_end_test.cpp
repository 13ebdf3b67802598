// SPDX-License-Identifier: Apache-2.0
// An operation ends, once, whatever is thrown on its way.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <future>
#include <latch>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/operation.hpp>
#include <kvferry/log.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/traits.hpp>

#include <kvferry/kit/init_exchange.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include "common/failing_allocations.hpp"
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using test::allocation_refused;
using test::allocations_left;

/// Calls `what` with so many allocations that succeed, and lets what it throws for want of more through.
template <class Function>
[[nodiscard]] bool throws_with(std::size_t allocations, Function what) {
  allocation_refused = false;
  allocations_left = allocations;
  bool thrown = false;
  try {
    what();
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  allocations_left = test::unlimited_allocations;
  return thrown;
}

struct Outcome {
  int calls = 0;
  std::error_code error;
};

class OperationEnd : public ::testing::Test {
 protected:
  [[nodiscard]] std::shared_ptr<Operation> start(Outcome& outcome, std::string* diagnostic = nullptr) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "a peer of a name that is too long for a string's own buffer";
    request.objects = {page_, page_};
    request.remote_indexes = {0, 1};
    request.diagnostic = diagnostic;
    auto operation = std::make_shared<Operation>(
        std::move(request), Completion::direct([&outcome](std::error_code ec, std::size_t) {
          ++outcome.calls;
          outcome.error = ec;
        }),
        Clock::now() + std::chrono::hours(1), registry_);
    EXPECT_FALSE(registry_->add(operation));
    return operation;
  }

  asio::io_context context_;
  std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  std::shared_ptr<OperationRegistry> registry_ = std::make_shared<OperationRegistry>(deadlines_, 16);
  std::vector<std::byte> page_ = std::vector<std::byte>(64);
};

TEST_F(OperationEnd, NeedsNoMemory) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    registry_ = std::make_shared<OperationRegistry>(deadlines_, 16);  // that has counted no error of this code
    Outcome outcome;
    std::string diagnostic = "of the call before";
    const auto operation = start(outcome, &diagnostic);
    EXPECT_FALSE(throws_with(allocations, [&] { operation->finish(errc::connection_lost); })) << allocations;
    refused = allocation_refused;
    ASSERT_EQ(outcome.calls, 1) << allocations;
    EXPECT_EQ(outcome.error, errc::connection_lost);
    EXPECT_TRUE(diagnostic.empty() || diagnostic.find("a peer of a name") != std::string::npos) << diagnostic;
    registry_->wait_until_empty();
  }
}

TEST_F(OperationEnd, WithoutALinkNeedsNoMemoryForASentence) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    registry_ = std::make_shared<OperationRegistry>(deadlines_, 16);
    registry_->set_awaited([](std::string_view) { return std::string(100, 'w'); });
    Outcome outcome;
    const auto operation = start(outcome);
    EXPECT_FALSE(throws_with(allocations, [&] { operation->request_stop(errc::timed_out); })) << allocations;
    refused = allocation_refused;
    ASSERT_EQ(outcome.calls, 1) << allocations;
    EXPECT_EQ(outcome.error, errc::timed_out);
  }
}

TEST_F(OperationEnd, OfACallThatConnectsNeedsNoMemory) {
  const auto exchanges = std::make_shared<InitExchanges>(deadlines_);
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    Outcome outcome;
    std::string diagnostic;
    InitRequest request;
    request.peer_id = "a peer of a name that is too long for a string's own buffer";
    request.diagnostic = &diagnostic;
    const auto exchange = exchanges->begin(
        std::move(request),
        SideMessageCompletion::direct([&outcome](std::error_code ec, const std::optional<SideMessage>&) {
          ++outcome.calls;
          outcome.error = ec;
        }),
        Clock::now() + std::chrono::hours(1));
    EXPECT_FALSE(throws_with(allocations, [&] { exchange->finish({errc::connection_lost, {}}); })) << allocations;
    refused = allocation_refused;
    ASSERT_EQ(outcome.calls, 1) << allocations;
    EXPECT_EQ(outcome.error, errc::connection_lost);
  }
}

/// What they drop is logged, at most so often: other tests are to find theirs.
class CallsShortOfMemory : public ::testing::Test {
 protected:
  CallsShortOfMemory() { set_log_sink({}, LogLevel::off); }
  ~CallsShortOfMemory() override { set_log_sink({}); }
};

TEST_F(CallsShortOfMemory, WriteNothingOnceTheyHaveThrown) {
  bool refused = true;
  int thrown = 0;
  for (std::size_t allocations = 0; refused; ++allocations) {
    auto diagnostic = std::make_unique<std::string>();
    tests::TestChannel channel({}, nullptr);
    std::error_code ec;
    const bool threw = throws_with(allocations, [&] {
      channel.lazy_init_peer_connection("a name that is too long for a string's own buffer",
                                        "a peer of a name that is too long for a string's own buffer",
                                        "tcp://127.0.0.1:1", {},
                                        {.timeout = std::chrono::milliseconds(1), .diagnostic = diagnostic.get()}, ec);
    });
    refused = allocation_refused;
    EXPECT_TRUE(threw || ec);
    thrown += threw ? 1 : 0;
    *diagnostic = "the caller's";
    channel.close();
    EXPECT_TRUE(!threw || *diagnostic == "the caller's") << allocations << ": " << *diagnostic;
  }
  EXPECT_GT(thrown, 0);
}

TEST_F(CallsShortOfMemory, AreOverInTheStatisticsToo) {
  const std::vector<std::byte> page(64);
  const std::array<std::uint64_t, 1> index{0};
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    tests::TestChannel channel({}, nullptr);  // that has counted no failure yet
    std::error_code ec;
    const bool threw = throws_with(allocations, [&] {
      (void)channel.batched_write({ConstBuffer(page)},
                                  {.peer_id = "a peer of a name that is too long for a string's own buffer",
                                   .remote_indexes = index,
                                   .timeout = std::chrono::seconds(1)},
                                  ec);
    });
    refused = allocation_refused;
    EXPECT_TRUE(threw || ec == errc::unknown_peer || ec == std::errc::not_enough_memory) << allocations << ": " << ec;
    const TransferStats writes = channel.stats().of(TransferKind::write);
    EXPECT_EQ(writes.in_flight(), 0U) << allocations;
    EXPECT_EQ(writes.failed(), writes.started) << allocations;
  }
}

/// How a channel introduces itself: who has the same number is the same channel.
[[nodiscard]] SideMessage question_of(std::uint64_t incarnation, std::uint64_t attempt) {
  InitQuestion question;
  question.transport = "test";
  question.sender_id = "a peer of a name that is too long for a string's own buffer";
  question.receiver_id = "here";
  question.incarnation = incarnation;
  question.secret = Bytes(16, static_cast<std::byte>(incarnation));
  question.attempt = attempt;
  return encode_side_message(question);
}

/// Is fenced off at once.
class FencedAtOnce final : public tests::KeepingLink {
 public:
  [[nodiscard]] bool fence(std::function<void()> done) override {
    done();
    return true;
  }
};

TEST_F(CallsShortOfMemory, AFenceEndsThatWaitedForAConnection) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    asio::io_context context;
    ChannelOptions options;
    options.executor = context.get_executor();
    options.peer_init_url = kvferry::testing::own_loopback_url();
    std::promise<LinkHandler> awaited;
    bool first = true;
    tests::TestChannel channel(options, [](const auto&) { return std::make_shared<FencedAtOnce>(); });
    channel.when_accepting([&](const std::shared_ptr<LinkHost>&, LinkHandler on_link) {
      if (std::exchange(first, false)) {
        on_link({}, std::make_shared<FencedAtOnce>(), {});
      } else {
        awaited.set_value(std::move(on_link));
      }
    });
    tests::TestChannel asking({}, nullptr);
    asking.send_init_side_msg(channel.peer_init_url(), question_of(2, 1));
    asking.send_init_side_msg(channel.peer_init_url(), question_of(2, 2));
    const LinkHandler on_link = awaited.get_future().get();
    auto alive = std::make_shared<int>();
    const std::weak_ptr<int> seen = alive;
    int calls = 0;
    channel.async_fence("a peer of a name that is too long for a string's own buffer", std::chrono::hours(1),
                        [&calls, alive = std::move(alive)](std::error_code) { ++calls; });
    context.restart();
    context.poll();
    ASSERT_EQ(calls, 0) << "it waits for the connection that is being made";
    on_link(errc::connection_lost, nullptr, "the test says so");
    allocation_refused = false;
    allocations_left = allocations;
    context.restart();
    context.poll();
    allocations_left = test::unlimited_allocations;
    refused = allocation_refused;
    while (!seen.expired() && context.run_one_for(std::chrono::seconds(30)) != 0) {
    }
    EXPECT_EQ(calls, 1) << allocations;
    context.restart();
    channel.close();
  }
}

class ShutLink final : public tests::KeepingLink {
 public:
  void shut(std::error_code cause, const std::string& why) override {
    is_shut = true;
    KeepingLink::shut(cause, why);
  }

  std::atomic<bool> is_shut{false};
};

TEST_F(CallsShortOfMemory, CloseShutsAllLinksIfItIsCalledAgain) {
#ifdef KVFERRY_TESTING_THREAD_SANITIZED
  GTEST_SKIP() << "ThreadSanitizer's pthread_once knows no exceptions: who calls again waits for ever";
#endif
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    ChannelOptions options;
    options.peer_init_url = kvferry::testing::own_loopback_url();
    const auto link = std::make_shared<ShutLink>();
    tests::TestChannel channel(options, [&](const auto&) { return link; });
    tests::TestChannel asking({}, nullptr);
    asking.send_init_side_msg(channel.peer_init_url(), question_of(2, 1));
    ASSERT_EQ(channel.peers().size(), 1U);
    (void)throws_with(allocations, [&] { channel.close(); });
    refused = allocation_refused;
    channel.close();
    EXPECT_TRUE(link->is_shut) << allocations;
  }
}

/// A link whose peer is silent, and keeps what it is asked.
class NeverProbed final : public tests::KeepingLink {
 public:
  void probe(std::function<void()>) override { is_asked.count_down(); }

  std::latch is_asked{1};
};

TEST_F(CallsShortOfMemory, WhoSaysThatHeIsAPeerIsJudgedAlsoAfterOneWhoCouldNotBe) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    asio::io_context context;
    ChannelOptions options;
    options.executor = context.get_executor();
    options.peer_init_url = kvferry::testing::own_loopback_url();
    const auto silent = std::make_shared<NeverProbed>();
    bool first = true;
    tests::TestChannel channel(options, [&](const auto&) -> std::shared_ptr<Link> {
      return std::exchange(first, false) ? std::shared_ptr<Link>(silent) : std::make_shared<tests::KeepingLink>();
    });
    tests::TestChannel asking({}, nullptr);
    asking.send_init_side_msg(channel.peer_init_url(), question_of(2, 1));
    asking.async_send_init_side_msg(channel.peer_init_url(), question_of(3, 1), {},
                                    [](std::error_code, const std::optional<SideMessage>&) {});
    silent->is_asked.wait();
    asking.send_init_side_msg(channel.peer_init_url(), question_of(2, 2));  // on whose new link it is asked again
    allocation_refused = false;
    allocations_left = allocations;
    context.poll();
    allocations_left = test::unlimited_allocations;
    refused = allocation_refused;
    std::error_code ec;
    asking.send_init_side_msg(channel.peer_init_url(), question_of(4, 1), {}, ec);
    ASSERT_EQ(ec, errc::identity_conflict) << allocations;
  }
}

TEST_F(CallsShortOfMemory, ThatConnectDoNotKeepTheNextFromIt) {
  ChannelOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  const auto make_link = [](const auto&) { return std::make_shared<tests::KeepingLink>(); };
  tests::TestChannel there(options, make_link);
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    const std::string here =
        "a channel of a name that is too long for a string's own buffer, " + std::to_string(allocations);
    tests::TestChannel channel({}, make_link);
    std::error_code ec;
    const auto connect = [&] {
      channel.lazy_init_peer_connection(here, "a peer of a name that is too long for a string's own buffer",
                                        there.peer_init_url(), {}, {.timeout = kvferry_test::long_enough}, ec);
    };
    (void)throws_with(allocations, connect);
    refused = allocation_refused;
    connect();
    ASSERT_FALSE(ec) << allocations << ": " << ec.message();
  }
}

/// Begins as many parts of an operation as it is told, and then has no memory for more.
class ShortOfMemory final : public Link {
 public:
  explicit ShortOfMemory(std::size_t parts) : parts_(parts) {}

  void start(std::shared_ptr<Operation> operation) override {
    if (parts_ != 0) {
      const auto batch = std::make_shared<StripedOperation>(std::move(operation), parts_ + 1);
      begun.assign(parts_, batch);
    }
    throw std::bad_alloc();
  }
  void stop(std::shared_ptr<Operation> operation) override {
    if (stops_without_memory != 0) {
      --stops_without_memory;
      throw std::bad_alloc();
    }
    stopped = operation->stop_cause();
  }
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] std::string path() const override { return "nowhere"; }

  std::vector<std::shared_ptr<StripedOperation>> begun;
  std::error_code stopped;
  int stops_without_memory = 0;

 private:
  const std::size_t parts_;
};

TEST_F(OperationEnd, ComesAtOnceWhereNothingOfItBegan) {
  Outcome outcome;
  const auto operation = start(outcome);
  EXPECT_NO_THROW(operation->start_on(std::make_shared<ShortOfMemory>(0)));
  EXPECT_EQ(outcome.calls, 1);
  EXPECT_EQ(outcome.error, std::errc::not_enough_memory);
  registry_->wait_until_empty();
}

TEST_F(OperationEnd, ComesWithTheLastPartThatBegan) {
  Outcome outcome;
  const auto operation = start(outcome);
  const auto link = std::make_shared<ShortOfMemory>(2);
  EXPECT_NO_THROW(operation->start_on(link));
  EXPECT_EQ(link->stopped, std::errc::not_enough_memory);
  EXPECT_FALSE(link->begun.front()->part_done({}, {}));
  link->begun.pop_back();
  EXPECT_EQ(outcome.calls, 0) << "the other part's buffers are in use";
  EXPECT_FALSE(link->begun.front()->part_done(link->stopped, {}));
  link->begun.clear();
  EXPECT_EQ(outcome.calls, 1);
  EXPECT_EQ(outcome.error, std::errc::not_enough_memory);
  registry_->wait_until_empty();
}

TEST_F(OperationEnd, WaitsForPartsThatCouldNotBeAskedToStop) {
  Outcome outcome;
  const auto operation = start(outcome);
  const auto link = std::make_shared<ShortOfMemory>(1);
  link->stops_without_memory = 1;
  EXPECT_NO_THROW(operation->start_on(link));
  EXPECT_EQ(outcome.calls, 0) << "the part's buffers are in use";
  EXPECT_FALSE(link->stopped);
  EXPECT_EQ(operation->stop_cause(), std::errc::not_enough_memory)
      << "a part that was asked all the same wants to know";
  operation->request_stop(errc::timed_out);
  EXPECT_EQ(link->stopped, errc::timed_out) << "its deadline can't ask any more";
  EXPECT_FALSE(link->begun.front()->part_done(link->stopped, {}));
  link->begun.clear();
  EXPECT_EQ(outcome.calls, 1);
  EXPECT_EQ(outcome.error, errc::timed_out);
  registry_->wait_until_empty();
}

/// Of two parts it has no memory to stop the second one.
class StopsHalf final : public Link {
 public:
  void start(std::shared_ptr<Operation> operation) override {
    batch = std::make_shared<StripedOperation>(std::move(operation), 2);
  }
  void stop(std::shared_ptr<Operation>) override {
    if (++stops == 1) {
      throw std::bad_alloc();
    }
  }
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] std::string path() const override { return "nowhere"; }

  std::shared_ptr<StripedOperation> batch;
  int stops = 0;
};

TEST_F(OperationEnd, IsNoSuccessWhereOnePartAloneWasAskedToStop) {
  Outcome outcome;
  const auto operation = start(outcome);
  const auto link = std::make_shared<StopsHalf>();
  operation->start_on(link);
  EXPECT_THROW(operation->request_stop(errc::cancelled), std::bad_alloc);
  EXPECT_FALSE(link->batch->part_done(operation->stop_cause(), {}));
  operation->request_stop(errc::timed_out);
  EXPECT_EQ(link->stops, 2) << "its deadline asks again";
  operation->request_stop(errc::closed);
  EXPECT_EQ(link->stops, 2);
  EXPECT_FALSE(link->batch->part_done({}, {}));
  EXPECT_EQ(outcome.calls, 1);
  EXPECT_EQ(outcome.error, errc::cancelled);
}

TEST_F(OperationEnd, OfPartsThatNobodyEndedIsNoSuccess) {
  Outcome outcome;
  (void)std::make_shared<StripedOperation>(start(outcome), 2)->part_done({}, {});
  EXPECT_EQ(outcome.calls, 1);
  EXPECT_EQ(outcome.error, std::errc::not_enough_memory);
}

TEST_F(OperationEnd, OfPartsIsTheCallersWhenAllSucceeded) {
  Outcome outcome;
  const auto operation = start(outcome);
  EXPECT_TRUE(std::make_shared<StripedOperation>(operation, 1)->part_done({}, {}));
  EXPECT_EQ(outcome.calls, 0);
  operation->finish({});
  EXPECT_EQ(outcome.calls, 1);
}

}  // namespace
}  // namespace kvferry::kit
