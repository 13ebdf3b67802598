// SPDX-License-Identifier: Apache-2.0
// Taking leave of a peer while others are on their way to it, and what else becomes of connections that take long.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/fence.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include "common/allocation_limit.hpp"
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

/// A table of peers without a channel, in which "p" has been connected, and answers nowhere. The test runs its timers.
class Leaving : public ::testing::Test {
 protected:
  Leaving() { directory_->use(service_, {}); }
  ~Leaving() override {
    directory_->close();
    service_.close();
  }

  void connect(const std::shared_ptr<Link>& link) {
    link_ = link;
    ask();
    ASSERT_TRUE(directory_->usable("p"));
  }
  void ask(std::uint64_t incarnation = 2) {
    InitQuestion question;
    question.transport = "test";
    question.sender_id = "p";
    question.receiver_id = "here";
    question.incarnation = incarnation;
    question.init_url = "tcp://127.0.0.1:1";
    question.secret = secret_;
    directory_->answer(encode_side_message(question), HandshakeService::Reply(nullptr));
  }
  /// Takes leave of the peer, which is known.
  void leave() {
    bool done = false;
    directory_->disconnect("p", [&](std::error_code) { done = true; });
    run_until(done);
  }
  void run_until(const bool& done) {
    const auto limit = Clock::now() + std::chrono::seconds(20);
    while (!done && Clock::now() < limit) {
      context_.restart();
      (void)context_.run_one_for(std::chrono::milliseconds(20));
    }
    ASSERT_TRUE(done);
  }
  void run_for(Clock::duration time) {
    const auto until = Clock::now() + time;
    while (Clock::now() < until) {
      context_.restart();
      (void)context_.run_one_until(until);
    }
  }
  /// Calls `what` with so many allocations that succeed. @return whether it threw for want of more.
  template <class What>
  [[nodiscard]] bool throws_with(std::size_t allocations, What what) {
    test::allocation_refused = false;
    test::allocations_left = allocations;
    bool thrown = false;
    try {
      what();
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    test::allocations_left = test::unlimited_allocations;
    return thrown;
  }
  void break_link() { host_->link_failed(*link_, errc::connection_lost); }

  [[nodiscard]] std::shared_ptr<Operation> add_write() {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "p";
    auto operation =
        std::make_shared<Operation>(std::move(request), Completion::direct([](std::error_code, std::size_t) {}),
                                    Clock::now() + std::chrono::hours(1), operations_);
    EXPECT_FALSE(operations_->add(operation));
    return operation;
  }

  asio::io_context context_;
  const ChannelOptions options_;
  const std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  const std::shared_ptr<OperationRegistry> operations_ = std::make_shared<OperationRegistry>(deadlines_, 16);
  int dials_ = 0;
  std::shared_ptr<Link> link_;
  std::shared_ptr<LinkHost> host_;
  std::optional<Bytes> secret_;
  bool holds_ = false;  ///< The test says when a link is there.
  LinkHandler held_;
  HandshakeService service_{{}, [](const SideMessage&, const HandshakeService::Reply&) {}};
  const std::shared_ptr<PeerDirectory> directory_ = std::make_shared<PeerDirectory>(
      options_, std::make_shared<RegionTable>(options_.regions), 1,
      TransportHooks{"test", false,
                     [this](const std::string&) {
                       ++dials_;
                       return std::make_unique<NoDial>();
                     },
                     [this](std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point, LinkHandler on_link) {
                       host_ = std::move(host);
                       if (holds_) {
                         held_ = std::move(on_link);
                       } else {
                         on_link({}, link_, {});
                       }
                       return Bytes();
                     },
                     [](const std::string&, std::size_t, const std::function<void()>& answer) {
                       answer();
                       return true;
                     }},
      deadlines_, std::make_shared<NotificationQueue>(deadlines_, NotificationQueue::Bounds{16, 4096, 4096}),
      std::make_shared<PeerEvents>(deadlines_, 16), operations_, std::make_shared<Logger>());
};

TEST_F(Leaving, AnOperationThatWasStoppedOnItsWayConnectsToNobody) {
  connect(std::make_shared<KeepingLink>());
  break_link();
  const auto stopped = add_write();
  (void)operations_->stop("p", errc::cancelled);
  directory_->route(stopped);
  EXPECT_EQ(dials_, 0);
  const auto another = add_write();
  directory_->route(another);
  EXPECT_EQ(dials_, 1);
  EXPECT_FALSE(directory_->awaited("p").empty());
  another->finish(errc::timed_out);
}

TEST_F(Leaving, NothingIsDialedForOperationsThatWereStopped) {
  connect(std::make_shared<KeepingLink>());
  break_link();
  // Comes to the table when the peer's calls have been ended, and its operations have not.
  const auto late = add_write();
  std::error_code told;
  directory_->connect("here", "p", "tcp://127.0.0.1:1", 0,
                      {Clock::now() + std::chrono::hours(1),
                       [&](const Failure& failure) {
                         told = failure.code;
                         directory_->route(late);
                       },
                       [&] { return static_cast<bool>(told); }});
  directory_->disconnect("p", [](std::error_code) {});
  EXPECT_EQ(told, errc::cancelled);
  EXPECT_TRUE(late->finished());
  EXPECT_EQ(dials_, 2);
  EXPECT_TRUE(directory_->awaited("p").empty()) << directory_->awaited("p");
}

TEST_F(Leaving, ACallThatIsLateWithItsAttemptSaysItselfForWhatItWaited) {
  connect(std::make_shared<KeepingLink>());
  break_link();
  // Where a busy machine has the second call begin an attempt of its own, the end of the table tells it.
  const auto told = std::make_shared<std::vector<std::error_code>>();
  const auto wait_until = [&](Clock::time_point deadline) {
    directory_->connect(
        "here", "p", "tcp://127.0.0.1:1", 0,
        {deadline, [told](const Failure& failure) { told->push_back(failure.code); }, [] { return false; }});
  };
  const auto first = Clock::now() + std::chrono::milliseconds(50);
  const auto attempts_end = first + longer_than_the_call;
  wait_until(first);
  wait_until(attempts_end - std::chrono::milliseconds(1));
  run_for(attempts_end + std::chrono::milliseconds(50) - Clock::now());
  context_.restart();
  context_.poll();
  EXPECT_TRUE(told->empty()) << told->front() << ", by the attempt";
  EXPECT_EQ(directory_->awaited("p"), "no answer from tcp://127.0.0.1:1");
}

/// Has something to say for as long as the test wants.
class StayingLink final : public KeepingLink {
 public:
  [[nodiscard]] std::optional<Pause> take_leave() override {
    return stays ? std::optional(Pause{{}, Clock::now()}) : std::nullopt;
  }
  void shut(std::error_code cause, const std::string& why) override {
    is_shut = true;
    KeepingLink::shut(cause, why);
  }

  bool stays = true;
  bool is_shut = false;
};

TEST_F(Leaving, ASecondDisconnectWaitsForTheFirstOnesGoodbye) {
  const auto link = std::make_shared<StayingLink>();
  connect(link);
  std::vector<int> done;
  directory_->disconnect("p", [&](std::error_code) { done.push_back(1); });
  directory_->disconnect("p", [&](std::error_code) { done.push_back(2); });
  for (int i = 0; i < 10; ++i) {
    context_.run_one();
  }
  EXPECT_FALSE(link->is_shut);
  EXPECT_TRUE(done.empty());
  link->stays = false;
  while (done.size() < 2 && context_.run_one() != 0) {
  }
  EXPECT_TRUE(link->is_shut);
  EXPECT_EQ(done, (std::vector<int>{1, 2}));
}

/// Counts what is started.
class CountingLink final : public KeepingLink {
 public:
  void start(std::shared_ptr<Operation> operation) override {
    ++started;
    KeepingLink::start(std::move(operation));
  }

  int started = 0;
};

TEST_F(Leaving, ALinkThatBreaksWithoutMemoryIsGoneAllTheSame) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    const auto link = std::make_shared<CountingLink>();
    connect(link);
    EXPECT_FALSE(throws_with(allocations, [&] { break_link(); })) << allocations;
    refused = test::allocation_refused;
    ASSERT_FALSE(directory_->usable("p")) << allocations;
    const auto next = add_write();
    directory_->route(next);
    EXPECT_FALSE(next->finished()) << "it waits for another link";
    EXPECT_EQ(link->started, 0);
    leave();
    EXPECT_TRUE(next->finished());
  }
}

TEST_F(Leaving, APeerThatIsConnectedWithoutMuchMemoryIsUsableOrIsNot) {
  holds_ = true;
  bool refused = true;
  bool was_usable = false;
  for (std::size_t allocations = 0; refused; ++allocations) {
    const auto link = std::make_shared<CountingLink>();
    ask();
    ASSERT_TRUE(held_);
    (void)throws_with(allocations, [&] { std::exchange(held_, nullptr)({}, link, {}); });
    refused = test::allocation_refused;
    if (directory_->usable("p")) {
      directory_->acknowledge("p");
      const auto next = add_write();
      directory_->route(next);
      EXPECT_EQ(link->started, 1) << "it waits for ever, after allocation " << allocations;
      next->finish({});
      was_usable = true;
    } else {
      EXPECT_TRUE(refused);
    }
    leave();
  }
  EXPECT_TRUE(was_usable);
}

TEST_F(Leaving, WithoutMemoryADisconnectHasNotBeenOrEnds) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    const auto link = std::make_shared<CountingLink>();
    connect(link);
    directory_->acknowledge("p");
    const auto under_way = add_write();
    directory_->route(under_way);
    ASSERT_EQ(link->started, 1);
    bool done = false;
    std::function<void(std::error_code)> then = [&](std::error_code) { done = true; };
    const bool thrown = throws_with(allocations, [&] { directory_->disconnect("p", std::move(then)); });
    refused = test::allocation_refused;
    EXPECT_EQ(directory_->usable("p"), thrown) << allocations;
    EXPECT_FALSE(throws_with(0, [&] { link->end_all(errc::cancelled, {}); }));
    EXPECT_TRUE(under_way->finished());
    if (!thrown) {
      run_until(done);
    }
    leave();
  }
}

TEST_F(Leaving, ALeaveThatFindsNoMemoryGoesOnLater) {
  connect(std::make_shared<KeepingLink>());
  const auto link = std::make_shared<StayingLink>();
  bool first = false;
  directory_->disconnect("p", [&](std::error_code) { first = true; });
  connect(link);
  bool second = false;
  directory_->disconnect("p", [&](std::error_code) { second = true; });
  // As if for a while nothing at all could be had; the timers alone run.
  const auto until = Clock::now() + std::chrono::milliseconds(20);
  while (Clock::now() < until) {
    context_.restart();
    (void)throws_with(0, [&] { (void)context_.run_one_for(std::chrono::milliseconds(1)); });
  }
  EXPECT_FALSE(second);
  link->stays = false;
  run_until(first);
  run_until(second);
  EXPECT_TRUE(link->is_shut);
}

TEST_F(Leaving, AFenceGoesOnWithoutMemoryWhenTheConnectionThatItWaitsForHasEnded) {
  holds_ = true;
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    ask();
    bool done = false;
    PeerDirectory::FenceHandler then = [&](std::error_code, const std::shared_ptr<Link>&) { done = true; };
    const bool thrown = throws_with(
        allocations, [&] { directory_->fence("p", Clock::now() + std::chrono::hours(1), std::move(then)); });
    refused = test::allocation_refused;
    EXPECT_FALSE(done);
    (void)throws_with(0, [&] { std::exchange(held_, nullptr)(errc::connection_lost, nullptr, {}); });
    if (!thrown) {
      run_until(done);
    }
  }
}

/// Has no memory for a fence.
class PoorLink final : public KeepingLink {
 public:
  [[nodiscard]] bool fence(std::function<void()>) override { throw std::bad_alloc(); }
};

TEST_F(Leaving, AFenceThatALinkHasNoMemoryForBreaksTheLinkAndEnds) {
  std::vector<std::error_code> ends;
  bool broken = false;
  PoorLink link;
  const auto fence =
      std::make_shared<Fence>(FenceCompletion::direct([&](std::error_code ec) { ends.push_back(ec); }),
                              Clock::now() + std::chrono::hours(1), deadlines_);
  EXPECT_NO_THROW(fence->wait_for(link, [&] { broken = true; }));
  EXPECT_TRUE(broken);
  EXPECT_EQ(ends, std::vector<std::error_code>(1));
  EXPECT_EQ(deadlines_->size(), 0U);
}

TEST_F(Leaving, AFenceWaitsForAnAttemptWithOtherWaysBehindASilentOne) {
  constexpr std::chrono::milliseconds first_way{1200};
  constexpr std::chrono::milliseconds patience{1000};
  holds_ = true;
  ask();
  const auto begun = Clock::now();
  host_->may_take_until(begun + first_way);
  bool done = false;
  directory_->fence("p", begun + std::chrono::hours(1),
                    [&](std::error_code, const std::shared_ptr<Link>&) { done = true; });
  run_until(done);
  EXPECT_GE(Clock::now() - begun, first_way + patience);
  bool dropped = false;
  host_->when_abandoned([&] { dropped = true; });
  EXPECT_TRUE(dropped) << "and not for ever";
}

// A peer that connects anew, and then doesn't come, is waited for.
TEST_F(Leaving, AFenceLeavesAConnectionThatWorksTimeForItsAnswer) {
  constexpr std::chrono::milliseconds timeout{200};
  secret_ = Bytes(16, std::byte{7});
  const auto link = std::make_shared<KeepingLink>();
  connect(link);
  holds_ = true;
  bool in_time = false;
  for (int round = 0; round < 50 && !in_time; ++round) {  // the machine may be busy, but not each time
    ask();
    ASSERT_TRUE(held_);
    const auto deadline = Clock::now() + timeout;
    bool done = false;
    directory_->fence("p", deadline, [&](std::error_code, const std::shared_ptr<Link>& current) {
      done = true;
      in_time = Clock::now() < deadline;
      EXPECT_EQ(current, link);
    });
    run_until(done);
    held_ = nullptr;
  }
  EXPECT_TRUE(in_time) << "all of it went to the attempt";
}

/// Answers a probe when the test says so.
class SlowLink final : public KeepingLink {
 public:
  void probe(std::function<void()> answered) override { answer = std::move(answered); }

  std::function<void()> answer;
};

/// One whose peer has not answered a probe while somebody else who says that he is the peer is on his way.
class Silence : public Leaving {
 protected:
  void SetUp() override {
    connect(silent_);
    holds_ = true;
    ask(3);
    const auto limit = Clock::now() + std::chrono::seconds(20);
    while (!held_ && Clock::now() < limit) {
      run_for(std::chrono::milliseconds(20));
    }
    ASSERT_TRUE(held_ && silent_->answer);
  }

  const std::shared_ptr<SlowLink> silent_ = std::make_shared<SlowLink>();
  const std::shared_ptr<Link> newcomer_ = std::make_shared<KeepingLink>();
};

TEST_F(Silence, LastsUntilTheNewcomerIsThereHoweverLongHisConnectionTakes) {
  run_for(std::chrono::milliseconds(5500));  // more than for another one that comes without a probe
  std::exchange(held_, nullptr)({}, newcomer_, {});
  EXPECT_EQ(directory_->link("p"), newcomer_);
}

TEST_F(Silence, EndsWithALateAnswer) {
  silent_->answer();
  std::exchange(held_, nullptr)({}, newcomer_, {});
  EXPECT_EQ(directory_->link("p"), silent_);
}

TEST_F(Leaving, AFirstDisconnectSparesASecondOnesLink) {
  connect(std::make_shared<KeepingLink>());
  bool first = false;
  bool second = false;
  directory_->disconnect("p", [&](std::error_code) { first = true; });
  const auto link = std::make_shared<StayingLink>();
  connect(link);
  directory_->disconnect("p", [&](std::error_code) { second = true; });
  while (!first && context_.run_one() != 0) {
  }
  EXPECT_FALSE(link->is_shut);
  EXPECT_FALSE(second);
  link->stays = false;
  while (!second && context_.run_one() != 0) {
  }
  EXPECT_TRUE(link->is_shut && second);
}

}  // namespace
}  // namespace kvferry::kit::tests
