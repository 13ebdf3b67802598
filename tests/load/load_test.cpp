// SPDX-License-Identifier: Apache-2.0
// Honest peers, many of them, at one hub. KVFERRY_LOAD_SECONDS sets how long they work (2), KVFERRY_LOAD_PEERS how many
// they are (64), KVFERRY_LOAD_CONNECTS how many come and go (300). Prints figures; verdicts are errors and bytes.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

namespace kvferry {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t page_size = 4096;
constexpr std::chrono::seconds patience{60};

std::size_t given(const char* name, std::size_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<std::size_t>(std::atoll(text));
}

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

struct Hub {
  explicit Hub(std::size_t pages) : memory(pages * page_size), channel(options()) {}

  TcpOptions options() {
    TcpOptions options;
    options.regions = {{memory.data(), memory.size(), page_size}};
    options.peer_init_url = "tcp://127.0.0.1:0";
    options.poll = PollPolicy::never();
    return options;
  }

  std::vector<std::byte> memory;
  TcpTransferChannel channel;
};

TcpOptions quiet() {
  TcpOptions options;
  options.poll = PollPolicy::never();
  return options;
}

TEST(Load, ManyPeersAtOneHub) {
  const std::size_t count = given("KVFERRY_LOAD_PEERS", 64);
  const auto until = Clock::now() + std::chrono::seconds(given("KVFERRY_LOAD_SECONDS", 2));
  Hub hub(count);
  std::vector<std::thread> peers;
  std::vector<std::size_t> rounds(count);
  std::vector<std::string> wrong(count);
  for (std::size_t peer = 0; peer < count; ++peer) {
    peers.emplace_back([&, peer] {
      std::vector<std::byte> sent(page_size);
      std::vector<std::byte> back(page_size);
      const std::vector<std::uint64_t> page{peer};
      TcpTransferChannel channel(quiet());
      std::error_code ec;
      std::string why;
      channel.lazy_init_peer_connection("peer-" + std::to_string(peer), "hub", hub.channel.peer_init_url(), {},
                                        {.timeout = patience, .diagnostic = &why}, ec);
      // At least one round, however long it took to connect.
      do {
        std::memset(sent.data(), static_cast<int>((peer + rounds[peer]) % 251), page_size);
        if (!ec) {
          channel.batched_write({ConstBuffer(sent.data(), page_size)},
                                {.peer_id = "hub", .remote_indexes = page, .timeout = patience, .diagnostic = &why},
                                ec);
        }
        if (!ec) {
          channel.batched_read({MutableBuffer(back.data(), page_size)},
                               {.peer_id = "hub", .remote_indexes = page, .timeout = patience, .diagnostic = &why}, ec);
        }
        if (ec || sent != back) {
          wrong[peer] = ec ? ec.message() + ": " + why : "other bytes came back";
          return;
        }
        ++rounds[peer];
      } while (Clock::now() < until);
    });
  }
  std::size_t all = 0;
  for (std::size_t peer = 0; peer < count; ++peer) {
    peers[peer].join();
    EXPECT_EQ(wrong[peer], "") << "peer " << peer;
    all += rounds[peer];
  }
  std::printf("%zu peers: %zu writes, each read back, no wrong byte\n", count, all);
}

TEST(Load, ManyConnects) {
  const std::size_t count = given("KVFERRY_LOAD_CONNECTS", 300);
  Hub hub(1);
  double slowest = 0;
  const auto begin = Clock::now();
  for (std::size_t i = 0; i < count; ++i) {
    TcpTransferChannel channel(quiet());
    const auto began = Clock::now();
    std::error_code ec;
    std::string why;
    channel.lazy_init_peer_connection("peer-" + std::to_string(i % 100), "hub", hub.channel.peer_init_url(), {},
                                      {.timeout = patience, .diagnostic = &why}, ec);
    ASSERT_FALSE(ec) << i << ": " << ec.message() << ": " << why;
    slowest = std::max(slowest, seconds_since(began));
  }
  std::printf("%zu connects in %.1f s, the slowest took %.0f ms\n", count, seconds_since(begin), slowest * 1e3);
}

}  // namespace
}  // namespace kvferry
