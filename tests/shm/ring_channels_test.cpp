// SPDX-License-Identifier: Apache-2.0
// Channels over rings: how their threads wait, and whose peers end.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/io_context.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <semaphore>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/held.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp/lane.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/forbidden_calls.hpp"
#include "common/patience.hpp"
#include "common/waiting_child.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace ring_channels {
namespace {

using kvferry::testing::PeerProcess;
using kvferry_test::long_enough;
using tcp::testing::fill;

/// Options of a channel that logs nothing. Peers may use `memory`, in pages of this size.
ShmOptions quiet_options(std::span<std::byte> memory = {}, std::size_t page = 4096) {
  ShmOptions options;
  options.log_sink = [](const LogRecord&) {};
  if (!memory.empty()) {
    options.regions = {{memory.data(), memory.size(), page}};
  }
  return kvferry_test::patient(options);
}

/// The same for a channel to which others connect.
ShmOptions listening(ShmOptions options) {
  options.peer_init_url = kvferry::testing::own_loopback_url();
  return options;
}

TEST(ChannelsOverRings, MoveEverythingHoweverTheirThreadsWait) {
  constexpr std::size_t page = std::size_t{16} << 10;
  constexpr std::size_t pages = 16;
  constexpr int rounds = 25;
  const std::array policies{PollPolicy::never(), PollPolicy{}, PollPolicy::always()};
  for (const PollPolicy& of_a : policies) {
    for (const PollPolicy& of_b : policies) {
      struct Node {
        explicit Node(const PollPolicy& poll, bool listens) : memory(pages * page) {
          ShmOptions options = quiet_options(memory, page);
          options.poll = poll;
          options.process_memory = false;  // so that all of it goes through the rings
          channel.emplace(listens ? listening(options) : options);
        }
        std::vector<std::byte> memory;
        std::optional<ShmTransferChannel> channel;
      };
      Node b(of_b, true);
      Node a(of_a, false);
      a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
      const std::string path = a.channel->peer_info("b").value_or(PeerInfo{}).path;
      ASSERT_NE(path.find("headers by rings"), std::string::npos) << path;
      const auto talk = [&](Node& node, const std::string& peer, std::size_t first) {
        std::mt19937 random(static_cast<unsigned>(first));
        std::vector<std::byte> out(8 * page);
        std::vector<std::byte> back(out.size());
        for (int round = 0; round < rounds; ++round) {
          const std::size_t count = 1 + random() % 7;
          const std::size_t length = random() % 4 == 0 ? page : 1 + random() % 4096;
          fill(out, static_cast<unsigned>(random()));
          std::vector<ConstBuffer> sources;
          std::vector<MutableBuffer> targets;
          std::vector<std::uint64_t> indexes;
          for (std::size_t i = 0; i < count; ++i) {
            sources.emplace_back(out.data() + i * page, length);
            targets.emplace_back(back.data() + i * page, length);
            indexes.push_back(first + i);
          }
          node.channel->batched_write(
              sources, {.peer_id = peer, .remote_indexes = indexes, .notification = std::span(out).first(8)});
          node.channel->batched_read(targets, {.peer_id = peer, .remote_indexes = indexes});
          for (std::size_t i = 0; i < count; ++i) {
            ASSERT_EQ(std::memcmp(out.data() + i * page, back.data() + i * page, length), 0);
          }
        }
      };
      // Each writes to its own half of the other's memory; two threads of a's take turns at leading the lane.
      std::thread of_a_too([&] { talk(a, "b", 0); });
      std::thread from_b([&] { talk(b, "a", 0); });
      talk(a, "b", 8);
      of_a_too.join();
      from_b.join();
      for (int i = 0; i < 2 * rounds; ++i) {
        EXPECT_EQ(b.channel->receive_notification(long_enough).peer_id, "a");
      }
    }
  }
}

/// The thread of a blocking call sleeps. Others that look at the rings for it, since calls of theirs have timed out, leave it to the bell.
TEST(ChannelsOverRings, WakeACallThatSleepsThoughOthersHaveLookedMeanwhile) {
  ShmOptions options = quiet_options();
  options.poll = PollPolicy::never();
  ShmTransferChannel a(options);
  ShmTransferChannel b(listening(options));
  a.lazy_init_peer_connection("a", "b", b.peer_init_url());
  std::array<std::byte, 8> first{};
  std::array<std::byte, 8> second{};
  std::error_code ec;
  std::thread sleeper([&] {
    a.batched_recv({MutableBuffer(first.data(), first.size())}, {.peer_id = "b", .tag = 1, .timeout = long_enough}, ec);
  });
  const auto until = std::chrono::steady_clock::now() + long_enough;
  while (a.stats().of(TransferKind::recv).in_flight() == 0 && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  for (int i = 0; i < 5; ++i) {
    std::error_code late;
    a.batched_recv({MutableBuffer(second.data(), second.size())},
                   {.peer_id = "b", .tag = 2, .timeout = std::chrono::milliseconds(20)}, late);
    EXPECT_EQ(late, errc::timed_out);
  }
  const std::array<std::byte, 8> sent{std::byte{1}, std::byte{2}};
  // At the deadline of its own the other call would find what no bell has told it.
  std::error_code unheard;
  b.batched_send({ConstBuffer(sent.data(), sent.size())}, {.peer_id = "a", .tag = 1, .timeout = long_enough / 2},
                 unheard);
  EXPECT_FALSE(unheard) << unheard.message();
  sleeper.join();
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_EQ(first, sent);
}

/// Where no file can be made for a ring, the bytes go through the socket, as to peers that know of none.
TEST(ChannelsOverRings, DoWithoutWhereThereCanBeNone) {
  std::vector<std::byte> memory(4096 * 4);
  ShmTransferChannel a(quiet_options(memory));
  std::vector<std::byte> of_b(memory.size());
  ShmTransferChannel b(listening(quiet_options(of_b)));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::error_code ec;
  a.lazy_init_peer_connection("a", "b", b.peer_init_url(), {}, {}, ec);
  ::setrlimit(RLIMIT_FSIZE, &before);
  ASSERT_FALSE(ec) << ec.message();
  EXPECT_NE(a.peer_info("b").value_or(PeerInfo{}).path.find("headers by the socket (no rings: the peer passed none)"),
            std::string::npos);
  EXPECT_NE(b.peer_info("a").value_or(PeerInfo{}).path.find("no rings: this side could not make one: File too large"),
            std::string::npos);
  fill(memory, 1);
  const std::vector<std::uint64_t> indexes{0, 1, 2, 3};
  std::vector<ConstBuffer> pages;
  for (const std::uint64_t index : indexes) {
    pages.emplace_back(memory.data() + index * 4096, 4096);
  }
  EXPECT_EQ(a.batched_write(pages, {.peer_id = "b", .remote_indexes = indexes}), 4U);
  EXPECT_EQ(memory, of_b);
}

/// A peer that is killed while it answers, and that can't be connected to anew.
TEST(ChannelsOverRings, FindTheEndOfAPeerThatIsKilled) {
  constexpr std::size_t page = 4096;
  std::vector<std::byte> memory(page);
  ShmOptions options = quiet_options(memory, page);
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    ShmTransferChannel channel(options);
    while (const auto url = line.read_line(long_enough)) {
      channel.lazy_init_peer_connection("mortal", "a", *url);
      line.write_line("connected");
    }
    return;
  }
  for (const PollPolicy& poll : {PollPolicy::never(), PollPolicy{}, PollPolicy::always()}) {
    PeerProcess process(long_enough);
    options.poll = poll;
    ShmTransferChannel channel(listening(options));
    ASSERT_EQ(process.ask(channel.peer_init_url()), "connected");
    const std::vector<std::uint64_t> index{0};
    std::error_code ec;
    std::optional<std::thread> killer;
    const auto until = std::chrono::steady_clock::now() + long_enough;
    for (int writes = 0; !ec && std::chrono::steady_clock::now() < until; ++writes) {
      channel.batched_write({ConstBuffer(memory.data(), page)},
                            {.peer_id = "mortal", .remote_indexes = index, .timeout = long_enough}, ec);
      if (writes == 100) {
        killer.emplace([&] { process.kill(); });
      }
    }
    EXPECT_EQ(ec, condition::peer_failed) << ec.message();
    if (killer) {
      killer->join();
    }
  }
}

}  // namespace
}  // namespace ring_channels
}  // namespace kvferry::shm::testing
