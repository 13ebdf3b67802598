// SPDX-License-Identifier: Apache-2.0
// A lane between blocking calls that follow each other at once.
#include <kvferry/tcp/lane.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include "common/patience.hpp"
#include "protocol_harness.hpp"
#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using testing::Connection;
using testing::Host;

/// A lane whose thread asks its peer whether it lives, and waits for the answer as a blocking call does.
class AskingLane {
 public:
  AskingLane() {
    // Bytes arrive at once.
    const int on = 1;
    EXPECT_EQ(::setsockopt(near_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)), 0);
    connection_.far.set_option(asio::ip::tcp::no_delay(true));
    lane_->run({});
  }
  AskingLane(const AskingLane&) = delete;
  AskingLane& operator=(const AskingLane&) = delete;
  ~AskingLane() {
    lane_->shut(errc::closed, "the test ends it");
    lane_->disconnect();
    context_.poll();
  }

  void call() {
    const auto socket = lane_->begin_leading();
    bool answered = false;
    lane_->probe([&] { answered = true; });
    FrameHeader header;
    asio::read(connection_.far, asio::buffer(&header, sizeof(header)));
    header.type = FrameType::probe_answer;
    asio::write(connection_.far, asio::buffer(&header, sizeof(header)));
    while (!answered) {
      (void)lane_->lead();
    }
    lane_->end_leading();
  }

  /// The peer asks.
  void ask() {
    FrameHeader probe;
    probe.type = FrameType::probe;
    probe.operation = ++asked_;
    asio::write(connection_.far, asio::buffer(&probe, sizeof(probe)));
  }
  /// Whether the lane has answered by the time.
  [[nodiscard]] bool answers(kit::Clock::time_point until) {
    FrameHeader answer;
    std::error_code ec = asio::error::would_block;
    connection_.far.non_blocking(true);
    connection_.far.receive(asio::buffer(&answer, sizeof(answer)), 0, ec);
    while (ec == asio::error::would_block && kit::Clock::now() < until) {
      context_.run_one_for(std::chrono::milliseconds(100));
      connection_.far.receive(asio::buffer(&answer, sizeof(answer)), 0, ec);
    }
    connection_.far.non_blocking(false);
    return !ec && answer.type == FrameType::probe_answer && answer.operation == asked_;
  }
  /// How many handlers have run: of events, and of the timer, if that has ended.
  [[nodiscard]] std::size_t run_what_is_ready() { return context_.poll(); }

  /// Makes calls until one more is expected, then has the peer ask. @return whether an event tells of the question.
  [[nodiscard]] bool question_is_reported() {
    for (std::uint64_t made = 0; made < 2 * shortest_row; ++made) {
      call();
    }
    (void)run_what_is_ready();  // what has been asked for before
    call();
    ask();
    return run_what_is_ready() != 0;
  }

 private:
  asio::io_context context_;
  Connection connection_{context_};
  const int near_ = connection_.near.native_handle();
  std::shared_ptr<Lane> lane_ = std::make_shared<Lane>(
      std::move(connection_.near), std::make_shared<Host>(std::vector<MemoryRegion>{}),
      Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context_.get_executor()), {}},
      std::weak_ptr<Lane::Owner>());
  std::uint64_t asked_ = 0;
};

// No event is asked for, and yet what the peer begins then is heard. A thread that stands still between two calls, or behind the last
// one, is attended to by the timer: then once more, with a lane that has seen nothing of that.
TEST(LaneBetweenCalls, IsLeftToTheNextOneAfterManyInARow) {
  const auto until = kit::Clock::now() + kvferry_test::long_enough;
  bool left = false;
  bool answers = true;
  while (!left && answers && kit::Clock::now() < until) {
    AskingLane lane;
    left = !lane.question_is_reported();
    answers = lane.answers(until);
  }
  EXPECT_TRUE(left) << "each call asks for an event";
  EXPECT_TRUE(answers) << "nobody waits for what comes";
}

// One that was left again and again to peers who then had something to say is no more so. The timer, which may end first where the
// thread stands still, doesn't do so many times in a row.
TEST(LaneBetweenCalls, IsWaitedForWherePeersBeginSomething) {
  constexpr int often = 20;
  AskingLane lane;
  const auto until = kit::Clock::now() + kvferry_test::long_enough;
  int reported_in_a_row = 0;
  for (int round = 0; round < 1000 && reported_in_a_row < often; ++round) {
    reported_in_a_row = lane.question_is_reported() ? reported_in_a_row + 1 : 0;
    ASSERT_TRUE(lane.answers(until));
  }
  EXPECT_EQ(reported_in_a_row, often);
}

}  // namespace
}  // namespace kvferry::tcp
