// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/lane.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/write.hpp>

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/detail/descriptor.hpp>

#include "protocol_harness.hpp"
#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using testing::Connection;
using testing::Host;
using testing::WritingLane;

// Each of them holds the lane for a moment, while the other leaves its work to whoever holds it.
TEST(Lane, AnOperationThatMeetsTheEndOfItsLaneEndsToo) {
  constexpr int rounds = 2000;
  asio::io_context context;
  const auto host = std::make_shared<Host>(std::vector<MemoryRegion>{});
  const auto deadlines = std::make_shared<kit::DeadlineQueue>(context.get_executor());
  const auto registry = std::make_shared<kit::OperationRegistry>(deadlines, 16);
  const auto events = std::make_shared<SocketEvents>(context.get_executor());
  std::shared_ptr<Lane> lane;
  std::barrier turn(2);
  std::thread disconnecting([&] {
    for (int round = 0; round < rounds; ++round) {
      turn.arrive_and_wait();
      lane->disconnect();
      turn.arrive_and_wait();
    }
  });
  int ended = 0;
  for (int round = 0; round < rounds; ++round) {
    Connection connection(context);
    lane = std::make_shared<Lane>(std::move(connection.near), host, Lane::Options{std::chrono::seconds(1), events, {}},
                                  std::weak_ptr<Lane::Owner>());
    lane->run({});
    lane->shut(errc::closed, "the test ends it");
    std::vector<std::byte> object(64);
    TransferRequest request;
    request.kind = TransferKind::send;
    request.objects = {object};
    std::error_code cause;
    const auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([&](std::error_code ec, std::size_t) {
          ++ended;
          cause = ec;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry);
    EXPECT_FALSE(registry->add(operation));
    turn.arrive_and_wait();
    lane->start(std::make_shared<StripedOperation>(operation, 1), {0, 1});
    turn.arrive_and_wait();
    EXPECT_EQ(ended, round + 1);
    EXPECT_EQ(cause, errc::closed);
    operation->finish(errc::closed);  // if it has not ended: it and the registry hold each other
    ended = round + 1;
    context.poll();
    context.restart();
  }
  disconnecting.join();
}

/// A thread that looks at a lane which isn't its to look at, again and again.
class Looker {
 public:
  explicit Looker(Lane& lane) : thread_([this, &lane] {
    while (!done_) {
      (void)lane.poll();
      ++looks_;
    }
  }) {}
  Looker(const Looker&) = delete;
  Looker& operator=(const Looker&) = delete;
  ~Looker() {
    done_ = true;
    thread_.join();
  }
  [[nodiscard]] std::uint64_t looks() const { return looks_; }

 private:
  std::atomic<bool> done_{false};
  std::atomic<std::uint64_t> looks_{0};
  std::thread thread_;
};

/// That of a peer which takes nothing any more, and has always something to say: frames that mean nothing.
class TalkingSocket final : public Socket {
 public:
  static constexpr std::size_t no_end = std::size_t{128} << 20;

  TalkingSocket(int descriptor, int cause) : Socket(descriptor), cause_(cause) { frame_.type = FrameType::recv_cancel; }

  [[nodiscard]] ssize_t send(std::span<iovec> /*pieces*/) override {
    failed_ = true;
    errno = cause_;
    return -1;
  }
  [[nodiscard]] ssize_t receive(std::span<iovec> pieces) override {
    if (said_after_ >= no_end) {
      errno = EAGAIN;
      return -1;
    }
    ssize_t count = 0;
    for (const iovec& piece : pieces) {
      for (auto& byte : std::span(static_cast<std::byte*>(piece.iov_base), piece.iov_len)) {
        byte = std::as_bytes(std::span(&frame_, 1))[said_++ % sizeof(frame_)];
      }
      count += static_cast<ssize_t>(piece.iov_len);
    }
    said_after_ += failed_ ? static_cast<std::size_t>(count) : 0;
    return count;
  }
  /// How many bytes were listened to after it had failed.
  [[nodiscard]] std::size_t said_after() const noexcept { return said_after_; }

 private:
  const int cause_;
  FrameHeader frame_;
  std::size_t said_ = 0;
  bool failed_ = false;
  std::size_t said_after_ = 0;
};

// A peer's words before its connection broke count, but a peer that goes on talking doesn't hold the thread.
TEST(Lane, ListensToLastWordsThatHaveAnEnd) {
  for (const int cause : {EPIPE, senseless_peer}) {
    asio::io_context context;
    std::array<int, 2> ends{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
    const kvferry::Descriptor far(ends[1]);
    const auto socket = std::make_shared<TalkingSocket>(ends[0], cause);
    const auto lane = std::make_shared<Lane>(
        Lane::Connection{context.get_executor(), socket, "here", "there"}, std::make_shared<Host>(std::vector<MemoryRegion>{}),
        Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context.get_executor()), {}},
        std::weak_ptr<Lane::Owner>());
    std::array<std::byte, 8> first{};
    lane->run(first);
    EXPECT_LT(socket->said_after(), TalkingSocket::no_end);
    EXPECT_EQ(socket->said_after() != 0, cause == EPIPE);
    lane->shut(errc::closed, "the test ends");
    lane->disconnect();
    context.poll();
  }
}

// A thread that looks holds the lane for a moment. Other threads leave their work for the lane to it.
void expect_that_work_is_done_while_somebody_looks(bool failed) {
  constexpr int rounds = 100;
  asio::io_context context;
  Connection connection(context);
  const auto host = std::make_shared<Host>(std::vector<MemoryRegion>{});
  const auto registry =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context.get_executor()), 16);
  const auto events = std::make_shared<SocketEvents>(context.get_executor());
  const auto lane = std::make_shared<Lane>(std::move(connection.near), host,
                                           Lane::Options{std::chrono::seconds(1), events, {}}, std::weak_ptr<Lane::Owner>());
  lane->run({});
  if (failed) {
    lane->shut(errc::closed, "the test ends it");
  }
  Looker looker(*lane);
  std::vector<std::byte> object(64);
  bool stuck = false;
  for (int round = 0; round < rounds && !stuck; ++round) {
    std::atomic<bool> ended{false};
    TransferRequest request;
    request.kind = TransferKind::recv;
    request.objects = {object};
    const auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([&](std::error_code, std::size_t) { ended = true; }),
        kit::Clock::now() + std::chrono::hours(1), registry);
    EXPECT_FALSE(registry->add(operation));
    lane->start(std::make_shared<StripedOperation>(operation, 1), {0, 1});
    if (!failed) {
      operation->request_stop(errc::cancelled);
      lane->stop(operation);
    }
    const std::uint64_t looks = looker.looks();
    const auto until = kit::Clock::now() + std::chrono::seconds(30);
    while (!stuck && (!ended || looker.looks() == looks)) {
      std::this_thread::yield();
      stuck = kit::Clock::now() > until;
    }
    operation->finish(errc::closed);
  }
  EXPECT_FALSE(stuck) << "the thread that looks goes round and leaves the work where it is";
  lane->shut(errc::closed, "the test ends it");  // takes the work out of the way, so that the test can end
  lane->disconnect();
  context.poll();
}

TEST(Lane, DoesItsWorkWhileSomebodyLooksWhoseTurnItIsNot) { expect_that_work_is_done_while_somebody_looks(false); }

TEST(Lane, EndsOperationsWhileSomebodyLooksAfterItsEnd) { expect_that_work_is_done_while_somebody_looks(true); }

// A thread that looks may hold the lane just when its leader leaves. Somebody has to wait for the lane's next bytes all the same.
TEST(Lane, IsWaitedForWhenItsLeaderLeavesWhileSomebodyLooks) {
  constexpr int rounds = 100;
  asio::io_context context;
  Connection connection(context);
  const auto lane = std::make_shared<Lane>(
      std::move(connection.near), std::make_shared<Host>(std::vector<MemoryRegion>{}),
      Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context.get_executor()), {}},
      std::weak_ptr<Lane::Owner>());
  lane->run({});
  connection.far.non_blocking(true);
  bool answered = true;
  for (int round = 0; round < rounds && answered; ++round) {
    {
      Looker looker(*lane);
      while (looker.looks() == 0) {
        std::this_thread::yield();
      }
      const auto socket = lane->begin_leading();
      lane->end_leading();
    }
    FrameHeader probe;
    probe.type = FrameType::probe;
    probe.operation = static_cast<std::uint64_t>(round) + 1;
    asio::write(connection.far, asio::buffer(&probe, sizeof(probe)));
    FrameHeader answer;
    const auto until = kit::Clock::now() + std::chrono::seconds(30);
    std::error_code ec = asio::error::would_block;
    while (ec == asio::error::would_block && kit::Clock::now() < until) {
      context.run_one_for(std::chrono::milliseconds(100));
      connection.far.receive(asio::buffer(&answer, sizeof(answer)), 0, ec);
    }
    answered = !ec && answer.operation == probe.operation;
  }
  EXPECT_TRUE(answered) << "nobody waits for what comes";
  lane->shut(errc::closed, "the test ends it");
  lane->disconnect();
  context.poll();
}

TEST(Lane, ACallerWhoDoesNotWaitSendsTheBeginningOnly) {
  WritingLane writing;
  const std::uint64_t sent = writing.sent_by_start();
  EXPECT_GT(sent, 0U);
  EXPECT_LE(sent, std::uint64_t{320} << 10);
  writing.context.poll();
  EXPECT_GT(writing.traffic->sent.load(), sent) << "an I/O thread goes on";
}

// It would be the one that goes on; but other lanes would have their turns first.
TEST(Lane, AThreadOfTheExecutorSendsMoreThanTheBeginning) {
  WritingLane writing;
  std::uint64_t sent = 0;
  asio::post(writing.context, [&] { sent = writing.sent_by_start(); });
  writing.context.run_one();
  EXPECT_GT(sent, std::uint64_t{320} << 10);
}

TEST(Lane, ACallerWhoWaitsSendsWholeFrames) {
  WritingLane writing;
  const auto socket = writing.lane->begin_leading();
  EXPECT_GT(writing.sent_by_start(), std::uint64_t{1} << 20);
  writing.lane->end_leading();
}

}  // namespace
}  // namespace kvferry::tcp
