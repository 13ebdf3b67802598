// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/tcp_link.hpp>

#include <gtest/gtest.h>

#include <pthread.h>
#include <sched.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/detail/event_descriptor.hpp>

#include "common/allocation_limit.hpp"
#include "common/nicer.hpp"
#include "common/patience.hpp"
#include "protocol_harness.hpp"
#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::Host;

/// A link of two lanes, or one, of which the test is the peer.
class TwoLanes : public ::testing::Test {
 protected:
  explicit TwoLanes(std::chrono::milliseconds drain_timeout = std::chrono::hours(1), std::size_t lanes = 2) {
    std::vector<Lane::Connection> near;
    for (tcp::socket& peer : std::span(peers_).first(lanes)) {
      tcp::acceptor acceptor(context_, {asio::ip::address_v4::loopback(), 0});
      tcp::socket socket(context_);
      socket.connect(acceptor.local_endpoint());
      acceptor.accept(peer);
      near.push_back(connection_of(std::move(socket)));
    }
    TcpLink::Options options;
    options.stripe_threshold = std::size_t{1} << 20;
    options.lane.drain_timeout = drain_timeout;
    options.lane.events = std::make_shared<SocketEvents>(context_.get_executor());
    link_ = TcpLink::create(host_, std::move(near), options);
    link_->run();
  }
  ~TwoLanes() override {
    if (link_) {
      link_->shut(errc::closed, "the test ends");
    }
    context_.poll();
  }

  /// Writes a page over the first lane.
  void start_write() { start_write(page_); }
  void start_write(MutableBuffer page) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.objects = {page};
    request.remote_indexes = {0};
    const auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([this](std::error_code ec, std::size_t) {
          ended_ = true;
          error_ = ec;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry_);
    EXPECT_FALSE(registry_->add(operation));
    link_->start(operation);
  }

  void run_until(const std::function<bool()>& done) {
    const auto limit = kit::Clock::now() + std::chrono::seconds(60);
    while (!done() && kit::Clock::now() < limit) {
      context_.run_one_for(std::chrono::seconds(1));
    }
    EXPECT_TRUE(done());
  }

  asio::io_context context_;
  std::shared_ptr<Host> host_ = std::make_shared<Host>(std::vector<MemoryRegion>{});
  std::shared_ptr<kit::OperationRegistry> registry_ =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context_.get_executor()), 16);
  std::array<tcp::socket, 2> peers_{tcp::socket(context_), tcp::socket(context_)};
  std::vector<std::byte> page_ = std::vector<std::byte>(64);
  std::shared_ptr<TcpLink> link_;
  bool ended_ = false;
  std::error_code error_;
};

TEST_F(TwoLanes, WhatThePeerAnsweredCountsThoughItsOtherConnectionEndsFirst) {
  start_write();
  FrameHeader header;
  asio::read(peers_[0], asio::buffer(&header, sizeof(header)));
  peers_[1].close();
  run_until([&] { return host_->failures == 1; });
  EXPECT_FALSE(ended_);

  FrameHeader answer;
  answer.type = FrameType::write_ack;
  answer.operation = header.operation;
  asio::write(peers_[0], asio::buffer(&answer, sizeof(answer)));
  run_until([&] { return ended_; });
  EXPECT_EQ(error_, std::error_code());
  EXPECT_EQ(host_->failures, 1);
}

TEST_F(TwoLanes, ALaneEndsWithItsOwnConnectionWhenThePeerHasClosed) {
  start_write();
  peers_[1].close();
  run_until([&] { return host_->failures == 1; });
  EXPECT_FALSE(ended_);
  peers_[0].close();
  run_until([&] { return ended_; });
  EXPECT_EQ(error_, condition::peer_failed);
  EXPECT_EQ(error_, condition::may_still_land);
  EXPECT_EQ(host_->failures, 1);
}

TEST_F(TwoLanes, AFenceThatEndsWithTheConnectionIsToldFromOneThatIsAnswered) {
  const auto ended = link_->ended();
  ASSERT_TRUE(ended);
  EXPECT_FALSE(*ended);
  std::optional<bool> known;
  ASSERT_TRUE(link_->fence([&] { known = *ended; }));
  for (tcp::socket& peer : peers_) {
    peer.close();
  }
  run_until([&] { return known.has_value(); });
  EXPECT_TRUE(known.value_or(false));
}

class TwoLanesOfAPeerThatGoesSilent : public TwoLanes {
 protected:
  TwoLanesOfAPeerThatGoesSilent() : TwoLanes(std::chrono::milliseconds(20)) {}
};

TEST_F(TwoLanesOfAPeerThatGoesSilent, ALaneOutlivesItsPeersOtherConnectionForTheDrainTimeoutAtMost) {
  start_write();
  peers_[1].close();
  run_until([&] { return ended_; });
  EXPECT_EQ(error_, condition::peer_failed);
  EXPECT_EQ(error_, condition::may_still_land);
}

// Its channel has dropped it by then, and finds it only as long as somebody keeps it.
TEST_F(TwoLanes, ALinkLivesAsLongAsALaneOfIt) {
  start_write();
  const std::weak_ptr<TcpLink> watched = link_;
  peers_[1].close();
  run_until([&] { return host_->failures == 1; });
  link_.reset();
  ASSERT_FALSE(watched.expired());
  watched.lock()->shut(errc::closed, "the test ends it");
  EXPECT_TRUE(ended_);
  EXPECT_EQ(error_, errc::closed_in_flight);
  context_.poll();
  EXPECT_TRUE(watched.expired());
}

class OneLane : public TwoLanes {
 protected:
  OneLane() : TwoLanes(std::chrono::hours(1), 1) {}

  void SetUp() override {
    if (::sched_getscheduler(0) == SCHED_IDLE) {
      GTEST_SKIP() << "all threads of this process run when nobody else wants to";
    }
  }

  [[nodiscard]] bool begin_and_end_serving() {
    const bool begun = link_->begin_serving();
    if (begun) {
      link_->end_serving();
    }
    return begun;
  }
  /// By a new thread, which is as nice as the calling one.
  [[nodiscard]] bool can_be_served_by_another() {
    bool served = false;
    std::thread([&] { served = begin_and_end_serving(); }).join();
    return served;
  }
  [[nodiscard]] static FrameHeader a_probe() {
    FrameHeader probe;
    probe.type = FrameType::probe;
    return probe;
  }
  /// The calling thread does what an I/O thread does: it answers the peer.
  void answer_the_peer() {
    const FrameHeader probe = a_probe();
    asio::write(peers_[0], asio::buffer(&probe, sizeof(probe)));
    run_until([&] { return peers_[0].available() >= sizeof(FrameHeader); });
    FrameHeader answer;
    asio::read(peers_[0], asio::buffer(&answer, sizeof(answer)));
    EXPECT_EQ(answer.type, FrameType::probe_answer);
  }
};

[[nodiscard]] bool have_others_run_first() {
  const sched_param none{};
  return ::pthread_setschedparam(::pthread_self(), SCHED_IDLE, &none) == 0;
}

/// For an end that never comes by itself.
class EndlessWait final : public kit::BlockingWait {
 public:
  [[nodiscard]] bool over() const noexcept override { return over_; }
  [[nodiscard]] int descriptor() override { return event_.descriptor(); }
  void end() {
    over_ = true;
    event_.set();
  }

 private:
  std::atomic<bool> over_{false};
  const EventDescriptor event_;
};

TEST_F(OneLane, IsNotServedByAThreadThatLetsOthersRunFirst) {
  bool serves = true;
  std::thread([&] {
    EXPECT_TRUE(have_others_run_first());
    serves = begin_and_end_serving();
  }).join();
  EXPECT_FALSE(serves);
  ASSERT_TRUE(link_->begin_serving());
  link_->end_serving();
}

TEST_F(OneLane, IsDrivenByOthersForAThreadThatLetsThemRunFirst) {
  std::thread([&] {
    EXPECT_TRUE(have_others_run_first());
    start_write();
  }).join();
  EXPECT_EQ(peers_[0].available(), 0U);
  run_until([&] { return peers_[0].available() >= sizeof(FrameHeader) + page_.size(); });
}

TEST_F(OneLane, BeginsWhatAThreadHasLeftToOthersBeforeWhatIsStartedLater) {
  std::vector<std::byte> first(64, std::byte{0xa1});
  std::vector<std::byte> second(64, std::byte{0xa2});
  std::thread([&] {
    EXPECT_TRUE(have_others_run_first());
    start_write(first);
  }).join();
  start_write(second);
  const std::size_t least = 2 * (sizeof(FrameHeader) + first.size());
  run_until([&] { return peers_[0].available() >= least; });
  std::vector<std::byte> sent(peers_[0].available());
  asio::read(peers_[0], asio::buffer(sent));
  const auto begin_of_second = std::search(sent.begin(), sent.end(), second.begin(), second.end());
  EXPECT_NE(begin_of_second, sent.end());
  EXPECT_NE(std::search(sent.begin(), begin_of_second, first.begin(), first.end()), begin_of_second);
}

TEST_F(OneLane, IsLeftByAThreadThatLetsOthersRunFirstFromNowOn) {
  EndlessWait wait;
  auto left_by_itself = std::async(std::launch::async, [&] {
    if (!link_->begin_serving()) {
      return false;
    }
    start_write();
    const bool others_run_first = have_others_run_first();
    link_->serve(wait);
    link_->end_serving();
    return others_run_first && !wait.over();
  });
  // It asks for its priority when it goes to sleep again. Until then the peer has it wake up.
  const FrameHeader probe = a_probe();
  // Where others want to run, it has its turn again after tens of seconds.
  const auto limit = kit::Clock::now() + 3 * kvferry_test::long_enough;
  while (left_by_itself.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready &&
         kit::Clock::now() < limit) {
    asio::write(peers_[0], asio::buffer(&probe, sizeof(probe)));
  }
  wait.end();
  EXPECT_TRUE(left_by_itself.get());
}

class OneLaneOfNicerThreads : public OneLane {
 protected:
  void SetUp() override {
    if (!test::may_be_nicer()) {
      GTEST_SKIP() << "no thread of this process can be nicer than others";
    }
  }
};

TEST_F(OneLaneOfNicerThreads, IsNotServedByThem) {
  std::thread([&] {
    EXPECT_TRUE(test::be_nicer());
    EXPECT_FALSE(begin_and_end_serving());
    start_write();
  }).join();
  EXPECT_EQ(peers_[0].available(), 0U);
  EXPECT_TRUE(link_->begin_serving());
  link_->end_serving();
}

TEST_F(OneLaneOfNicerThreads, IsServedByThemOnceAnIoThreadThatIsAsNiceHasDoneWhatTheyLeftToIt) {
  std::thread io([&] {
    EXPECT_TRUE(test::be_nicer());
    EXPECT_FALSE(can_be_served_by_another());
    std::thread([&] { start_write(); }).join();
    EXPECT_EQ(peers_[0].available(), 0U);
    run_until([&] { return peers_[0].available() != 0; });
    EXPECT_TRUE(can_be_served_by_another());
  });
  io.join();
}

// As when the whole process gets another priority while it runs.
TEST_F(OneLaneOfNicerThreads, IsServedByThemAgainWhenItsIoThreadHasBecomeAsNice) {
  std::thread io([&] {
    answer_the_peer();
    EXPECT_TRUE(can_be_served_by_another());
    EXPECT_TRUE(test::be_nicer());
    EXPECT_FALSE(can_be_served_by_another());
    for (int looks = 0; looks < 1024; ++looks) {
      answer_the_peer();
    }
    EXPECT_TRUE(can_be_served_by_another());
  });
  io.join();
}

TEST_F(TwoLanes, AViolationEndsAllLanesAtOnce) {
  start_write();
  const std::array<std::byte, 256> nonsense{};
  asio::write(peers_[1], asio::buffer(nonsense));
  run_until([&] { return ended_; });
  EXPECT_EQ(error_, condition::may_still_land);
}

/// A write over two lanes, of which as much is sent as its caller sends before the peer takes anything.
struct StripedWrite {
  static constexpr std::size_t page = std::size_t{2} << 20;

  StripedWrite() {
    std::vector<Lane::Connection> near_ends;
    std::vector<Lane::Connection> far_ends;
    for (int i = 0; i < 2; ++i) {
      testing::Connection connection(context);
      near_ends.push_back(connection_of(std::move(connection.near)));
      far_ends.push_back(connection_of(std::move(connection.far)));
    }
    TcpLink::Options options;
    options.lane.drain_timeout = std::chrono::hours(1);
    options.lane.events = std::make_shared<SocketEvents>(context.get_executor());
    near = TcpLink::create(std::make_shared<Host>(std::vector<MemoryRegion>{}), std::move(near_ends), options);
    far = TcpLink::create(far_host, std::move(far_ends), options);
    near->run();
    TransferRequest request;
    request.kind = TransferKind::write;
    request.objects = {{sent.data(), page}, {sent.data() + page, page}};
    request.remote_indexes = {0, 1};
    request.notification = {std::byte{1}};
    operation = std::make_shared<kit::Operation>(std::move(request),
                                                 Completion::direct([this](std::error_code ec, std::size_t) {
                                                   ended = true;
                                                   error = ec;
                                                 }),
                                                 kit::Clock::now() + std::chrono::hours(1), registry);
    EXPECT_FALSE(registry->add(operation));
    operation->start_on(near);
  }
  StripedWrite(const StripedWrite&) = delete;
  StripedWrite& operator=(const StripedWrite&) = delete;
  ~StripedWrite() {
    near->shut(errc::closed, "the test ends");
    far->shut(errc::closed, "the test ends");
    context.poll();
  }

  void run_until(const std::function<bool()>& done) {
    const auto limit = kit::Clock::now() + std::chrono::seconds(60);
    while (!done() && kit::Clock::now() < limit) {
      context.run_one_for(std::chrono::seconds(1));
    }
    EXPECT_TRUE(done());
  }

  [[nodiscard]] bool has_landed() const { return landed == sent; }

  asio::io_context context;
  std::vector<std::byte> sent = std::vector<std::byte>(2 * page, std::byte{7});
  std::vector<std::byte> landed = std::vector<std::byte>(2 * page);
  std::shared_ptr<Host> far_host =
      std::make_shared<Host>(std::vector<MemoryRegion>{{landed.data(), landed.size(), page}});
  std::shared_ptr<kit::OperationRegistry> registry =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context.get_executor()), 16);
  std::shared_ptr<TcpLink> near;
  std::shared_ptr<TcpLink> far;
  std::shared_ptr<kit::Operation> operation;
  bool ended = false;
  std::error_code error;
};

TEST(StripedWrites, EndWithTheirLastPart) {
  StripedWrite write;
  write.far->run();
  write.run_until([&] { return write.ended; });
  EXPECT_FALSE(write.error) << write.error.message();
  EXPECT_TRUE(write.has_landed());
  EXPECT_EQ(write.far_host->notifications.size(), 1U);
}

// Memory is used up at whatever point of the stop: one of the lanes may know of it, and the other one not.
TEST(StripedWrites, AreNoSuccessThatWereStoppedInPart) {
  std::size_t thrown = 0;
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    SCOPED_TRACE(allocations);
    StripedWrite write;
    test::allocation_refused = false;
    test::allocations_left = allocations;
    try {
      write.operation->request_stop(errc::cancelled);
    } catch (const std::bad_alloc&) {
      ++thrown;
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    write.far->run();
    write.run_until([&] { return write.ended; });
    EXPECT_TRUE(write.error || write.has_landed());
    EXPECT_TRUE(write.far_host->notifications.empty() || write.has_landed());
  }
  EXPECT_GT(thrown, 1U);
}

// Memory is used up when the connections break.
TEST(StripedWrites, OfBrokenConnectionsMayStillLand) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    SCOPED_TRACE(allocations);
    StripedWrite write;
    write.far->shut(errc::closed, "the peer goes");
    test::allocation_refused = false;
    test::allocations_left = allocations;
    for (int i = 0; i < 100 && !write.ended; ++i) {
      try {
        write.context.poll_one();
      } catch (const std::bad_alloc&) {
      }
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    write.run_until([&] { return write.ended; });
    EXPECT_EQ(write.error, condition::may_still_land) << write.error.message();
  }
}

}  // namespace
}  // namespace kvferry::tcp
