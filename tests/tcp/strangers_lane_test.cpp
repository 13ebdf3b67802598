// SPDX-License-Identifier: Apache-2.0
// A lane whose peer may say anything, or stop: how long a turn takes, and what is waited for.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/write.hpp>

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/tcp/lane.hpp>

#include "protocol_harness.hpp"
#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using testing::Connection;
using testing::Host;

/// A lane whose peer says what a test has it say, and what becomes of it.
struct StrangersLane {
  struct Owner final : Lane::Owner {
    void lane_breaking(std::error_code cause) override { breaks = cause; }
    void lane_broken(std::error_code, const std::string& cause) override { why = cause; }
    std::error_code breaks;
    std::string why;
  };

  explicit StrangersLane(std::chrono::milliseconds timeout, std::vector<MemoryRegion> regions = {})
      : frame_timeout(timeout), host(std::make_shared<Host>(std::move(regions))) {
    lane->run({});
  }
  StrangersLane(const StrangersLane&) = delete;
  StrangersLane& operator=(const StrangersLane&) = delete;
  ~StrangersLane() {
    lane->shut(errc::closed, "the test ends it");
    lane->disconnect();
    context.poll();
  }

  /// Until the lane has got it.
  void say(std::span<const std::byte> bytes) {
    const std::uint64_t expected = traffic->received + bytes.size();
    asio::write(connection.far, asio::buffer(bytes.data(), bytes.size()));
    while (traffic->received < expected && !owner->breaks) {
      context.run_one();
    }
  }

  /// Says all of it, as fast as the lane takes it. @return the most bytes that the lane took in one turn.
  std::uint64_t longest_turn_for(std::span<const std::byte> bytes) {
    std::thread sending([&] { asio::write(connection.far, asio::buffer(bytes.data(), bytes.size())); });
    std::uint64_t longest = 0;
    while (traffic->received < bytes.size() && !owner->breaks) {
      const std::uint64_t before = traffic->received;
      context.run_one();
      longest = std::max(longest, traffic->received - before);
    }
    sending.join();
    return longest;
  }

  const std::chrono::milliseconds frame_timeout;
  asio::io_context context;
  Connection connection{context};
  std::shared_ptr<Host> host;
  std::shared_ptr<LaneTraffic> traffic = std::make_shared<LaneTraffic>();
  std::shared_ptr<Owner> owner = std::make_shared<Owner>();
  std::shared_ptr<Lane> lane =
      std::make_shared<Lane>(std::move(connection.near), host,
                             Lane::Options{std::chrono::seconds(1),
                                           std::make_shared<SocketEvents>(context.get_executor()),
                                           {},
                                           traffic,
                                           nullptr,
                                           frame_timeout},
                             owner);
};

// Others that the thread looks after wait meanwhile: a turn is no longer for many small frames than for a few large ones.
TEST(StrangersLane, ATurnOfSmallFramesEndsAsWell) {
  struct Recv {
    FrameHeader header;
    Descriptor buffer{0, 4096};
  };
  constexpr std::size_t one_turn = 1100 * sizeof(Recv);
  std::vector<Recv> recvs(60'000);
  for (std::size_t i = 0; i < recvs.size(); ++i) {
    recvs[i].header.type = FrameType::recv_post;
    recvs[i].header.operation = i + 1;
    recvs[i].header.count = 1;
  }
  StrangersLane stranger(std::chrono::minutes(1));
  EXPECT_LT(stranger.longest_turn_for(std::as_bytes(std::span(recvs))), one_turn);
  EXPECT_FALSE(stranger.owner->breaks) << stranger.owner->why;
}

// Nor for frames of many small pieces of memory, which a peer asks for with a few bytes.
TEST(StrangersLane, ATurnOfSmallPiecesEndsAsWell) {
  constexpr std::uint32_t blocks = 1000;
  struct Write {
    FrameHeader header;
    RangeDescriptor range;
    BlockDescriptor block;
    std::array<std::byte, blocks> payload;
    FrameTrailer trailer;
  };
  constexpr std::size_t one_turn = 70 * sizeof(Write);
  std::vector<std::byte> memory(blocks * 2);
  std::vector<Write> writes(600);
  for (std::size_t i = 0; i < writes.size(); ++i) {
    FrameHeader& header = writes[i].header;
    header.type = FrameType::write;
    header.flags = FrameHeader::ranges | FrameHeader::last_chunk;
    header.operation = i + 1;
    header.count = 2;
    header.payload_bytes = blocks;
    writes[i].range = {0, blocks, RangeDescriptor::blocks};
    writes[i].block = {2, 1, 0};
    writes[i].payload.fill(std::byte{1});
  }
  StrangersLane stranger(std::chrono::minutes(1), {{memory.data(), memory.size(), memory.size()}});
  EXPECT_LT(stranger.longest_turn_for(std::as_bytes(std::span(writes))), one_turn);
  EXPECT_FALSE(stranger.owner->breaks) << stranger.owner->why;
  EXPECT_EQ(std::ranges::count(memory, std::byte{1}), blocks);
}

/// As TLS's, of a peer that says frames without end, in records of one byte.
class RecordsSocket final : public Socket {
 public:
  explicit RecordsSocket(int descriptor) : Socket(descriptor) { frame_.type = FrameType::recv_cancel; }

  [[nodiscard]] bool by_cpu() const noexcept override { return true; }
  [[nodiscard]] bool over() const noexcept override { return true; }
  [[nodiscard]] std::uint64_t records() const noexcept override { return records_; }
  [[nodiscard]] ssize_t receive(std::span<iovec> pieces) override {
    const std::size_t count = std::min<std::size_t>(pieces.front().iov_len, 1000);
    for (std::byte& byte : std::span(static_cast<std::byte*>(pieces.front().iov_base), count)) {
      byte = std::as_bytes(std::span(&frame_, 1))[records_++ % sizeof(frame_)];
    }
    return static_cast<ssize_t>(count);
  }

 private:
  FrameHeader frame_;
  std::uint64_t records_ = 0;
};

// Nor for what comes in many small records, each of which is decrypted by itself.
TEST(StrangersLane, ATurnOfSmallRecordsEndsAsWell) {
  constexpr std::uint64_t one_turn = 10'000;
  asio::io_context context;
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
  const kvferry::Descriptor far(ends[1]);
  const auto socket = std::make_shared<RecordsSocket>(ends[0]);
  const auto lane = std::make_shared<Lane>(
      Lane::Connection{context.get_executor(), socket, "here", "there"},
      std::make_shared<Host>(std::vector<MemoryRegion>{}),
      Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context.get_executor()), {}},
      std::weak_ptr<Lane::Owner>());
  lane->run({});
  EXPECT_GT(socket->records(), 0U);
  EXPECT_LT(socket->records(), one_turn);
  const std::uint64_t first_turn = socket->records();
  context.run_one();
  EXPECT_GT(socket->records(), first_turn) << "it goes on, when others have had their turn";
  lane->shut(errc::closed, "the test ends");
  lane->disconnect();
  context.poll();
}

TEST(StrangersLane, APeerThatStopsWithinAFrameIsGivenUp) {
  FrameHeader post;
  post.type = FrameType::recv_post;
  post.operation = 1;
  post.count = kit::max_paired_objects;
  const auto header = std::as_bytes(std::span(&post, 1));
  for (const std::size_t said : {std::size_t{1}, header.size()}) {
    SCOPED_TRACE(said);
    StrangersLane stranger(std::chrono::milliseconds(20));
    stranger.say(header.first(said));
    EXPECT_FALSE(stranger.owner->breaks);
    const auto until = kit::Clock::now() + std::chrono::seconds(30);
    while (stranger.owner->why.empty() && kit::Clock::now() < until) {
      stranger.context.run_one_until(until);
    }
    EXPECT_EQ(stranger.owner->breaks, errc::connection_lost);
    EXPECT_NE(stranger.owner->why.find("stopped within a frame"), std::string::npos) << stranger.owner->why;
  }
}

/// The first part of a frame that is far longer.
std::vector<std::byte> begun_frame() {
  FrameHeader post;
  post.type = FrameType::recv_post;
  post.operation = 1;
  post.count = kit::max_paired_objects;
  auto bytes = testing::frame_bytes(post);
  bytes.resize(4 * sizeof(FrameHeader));
  return bytes;
}

// The peer may have waited for room.
TEST(StrangersLane, TimeForWhichThisSideWasAwayIsNotThePeers) {
  const auto bytes = begun_frame();
  const auto said = std::span(bytes).first(bytes.size() / 2);
  std::string why;
  bool in_time = false;
  for (int rounds = 0; !in_time && rounds < 100; ++rounds) {
    StrangersLane stranger(std::chrono::milliseconds(250));
    stranger.say(said);
    asio::write(stranger.connection.far, asio::buffer(bytes.data() + said.size(), bytes.size() - said.size()));
    std::this_thread::sleep_for(stranger.frame_timeout);  // the thread is at something else
    const auto back = kit::Clock::now();
    stranger.context.poll();
    in_time = kit::Clock::now() < back + stranger.frame_timeout;
    why = stranger.owner->why;
    EXPECT_TRUE(stranger.owner->breaks || stranger.traffic->received == bytes.size());
    const auto until = kit::Clock::now() + std::chrono::seconds(30);
    while (!stranger.owner->breaks && kit::Clock::now() < until) {
      stranger.context.run_one_until(until);
    }
    EXPECT_EQ(stranger.owner->breaks, errc::connection_lost) << "it says nothing more";
  }
  EXPECT_TRUE(in_time) << "a machine this busy shows nothing";
  EXPECT_EQ(why, "");
}

TEST(StrangersLane, APeerThatDripsItsFrameIsNotWaitedForForEver) {
  const auto bytes = begun_frame();
  StrangersLane stranger(std::chrono::milliseconds(50));
  stranger.say(std::span(bytes).first(sizeof(FrameHeader)));
  for (std::size_t at = sizeof(FrameHeader); at < bytes.size() && !stranger.owner->breaks; ++at) {
    std::this_thread::sleep_for(stranger.frame_timeout);  // the lane finds that the time is over, and a byte
    asio::write(stranger.connection.far, asio::buffer(bytes.data() + at, 1));
    stranger.context.poll();
  }
  EXPECT_EQ(stranger.owner->breaks, errc::connection_lost);
}

TEST(StrangersLane, APeerThatEndsItsFramesIsKeptHoweverLongItPausesBetweenThem) {
  FrameHeader notify;
  notify.type = FrameType::notify;
  notify.operation = 1;
  const auto frame = testing::frame_bytes(notify);
  const auto bytes = std::span(frame);
  StrangersLane stranger(std::chrono::seconds(3));  // far longer than it takes to say the rest
  stranger.say(bytes.first(10));
  stranger.say(bytes.subspan(10));
  stranger.context.run_for(stranger.frame_timeout + std::chrono::milliseconds(100));  // by then the timer has run
  EXPECT_FALSE(stranger.owner->breaks) << stranger.owner->why;
}

}  // namespace
}  // namespace kvferry::tcp
