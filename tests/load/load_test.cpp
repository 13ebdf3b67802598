// SPDX-License-Identifier: Apache-2.0
// Honest peers, many of them, at one hub. KVFERRY_LOAD_SECONDS sets how long they work (2), KVFERRY_LOAD_PEERS how many
// they are (64), KVFERRY_LOAD_CONNECTS how many come and go (300), KVFERRY_LOAD_DIALERS how many of those at a time (2), and
// KVFERRY_LOAD_CONNECT_SECONDS after how long no more of them come (60). Prints figures; verdicts are errors, bytes, and
// descriptors that nobody uses any more.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include "load/hub.hpp"

namespace kvferry::inline KVFERRY_ABI::load {
namespace {

using kvferry::testing::ProcessFigures;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds patience{60};

std::size_t given(const char* name, std::size_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : static_cast<std::size_t>(std::atoll(text));
}

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void print(const char* who, const ProcessFigures& before, const ProcessFigures& after) {
  std::printf("  %s: %.1f MiB before, %.1f MiB after; %zu descriptors before, %zu after\n", who, before.resident_mib,
              after.resident_mib, before.descriptors, after.descriptors);
}

TEST(Load, ManyPeersAtOneHub) {
  const std::size_t count = given("KVFERRY_LOAD_PEERS", 64);
  if (Hub::is_here()) {
    Hub::serve(count);
    return;
  }
  Hub hub;
  ASSERT_NE(hub.url(), "");
  const ProcessFigures hub_before = hub.figures();
  const ProcessFigures peers_before = ProcessFigures::of();
  const auto until = Clock::now() + std::chrono::seconds(given("KVFERRY_LOAD_SECONDS", 2));
  std::vector<std::thread> peers;
  std::vector<std::size_t> rounds(count);
  std::vector<std::string> wrong(count);
  std::atomic<std::size_t> connected{0};
  for (std::size_t peer = 0; peer < count; ++peer) {
    peers.emplace_back([&, peer] {
      std::vector<std::byte> sent(page_size);
      std::vector<std::byte> back(page_size);
      const std::vector<std::uint64_t> page{peer};
      TcpTransferChannel channel(quiet());
      std::error_code ec;
      std::string why;
      channel.lazy_init_peer_connection("peer-" + std::to_string(peer), "hub", hub.url(), {},
                                        {.timeout = patience, .diagnostic = &why}, ec);
      ++connected;
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
  ProcessFigures hub_most;
  ProcessFigures peers_most;
  while (Clock::now() < until || connected < count) {
    const auto keep_most = [](ProcessFigures& most, const ProcessFigures& now) {
      most.resident_mib = std::max(most.resident_mib, now.resident_mib);
      most.descriptors = std::max(most.descriptors, now.descriptors);
    };
    keep_most(hub_most, hub.figures());
    keep_most(peers_most, ProcessFigures::of());
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  std::size_t all = 0;
  for (std::size_t peer = 0; peer < count; ++peer) {
    peers[peer].join();
    EXPECT_EQ(wrong[peer], "") << "peer " << peer;
    all += rounds[peer];
  }
  const auto hub_after = hub.figures_at_rest(hub_before.descriptors);
  EXPECT_LE(hub_after.descriptors, hub_before.descriptors);
  EXPECT_TRUE(hub.stop());
  std::printf(
      "%zu peers: %zu writes, each read back; at most %.1f MiB and %zu descriptors at the hub, %.1f MiB and %zu "
      "at the peers\n",
      count, all, hub_most.resident_mib, hub_most.descriptors, peers_most.resident_mib, peers_most.descriptors);
  print("hub", hub_before, hub_after);
  print("peers", peers_before, ProcessFigures::of());
}

/// Channels that connect, each for itself, and go, again and again.
struct Dialer {
  void run(const std::string& url, std::atomic<std::size_t>& next, std::size_t count, Clock::time_point until) {
    for (std::size_t i = next++; i < count && Clock::now() < until && error.empty(); i = next++) {
      TcpTransferChannel channel(quiet());
      const auto began = Clock::now();
      std::error_code ec;
      std::string why;
      // The names come again: that a peer has restarted is part of it.
      channel.lazy_init_peer_connection("peer-" + std::to_string(i % 100), "hub", url, {},
                                        {.timeout = patience, .diagnostic = &why}, ec);
      if (ec) {
        error = std::to_string(i) + ": " + ec.message() + ": " + why;
      } else {
        took.push_back(seconds_since(began) * 1e3);
      }
    }
  }

  std::vector<double> took;  ///< Milliseconds, of each connect.
  std::string error;
};

TEST(Load, ManyConnects) {
  const std::size_t count = given("KVFERRY_LOAD_CONNECTS", 300);
  if (Hub::is_here()) {
    Hub::serve(1);
    return;
  }
  Hub hub;
  ASSERT_NE(hub.url(), "");
  const ProcessFigures hub_before = hub.figures();
  const ProcessFigures dialers_before = ProcessFigures::of();
  std::vector<Dialer> dialers(std::max<std::size_t>(given("KVFERRY_LOAD_DIALERS", 2), 1));
  std::atomic<std::size_t> next{0};
  const auto begin = Clock::now();
  // It ends, also on a machine that others use: with fewer connects.
  const auto until = begin + std::chrono::seconds(given("KVFERRY_LOAD_CONNECT_SECONDS", 60));
  std::vector<std::thread> threads;
  for (Dialer& dialer : dialers) {
    threads.emplace_back([&] { dialer.run(hub.url(), next, count, until); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const double lasted = seconds_since(begin);
  const ProcessFigures dialers_after = ProcessFigures::of();
  const ProcessFigures hub_after = hub.figures_at_rest(hub_before.descriptors);
  EXPECT_LE(hub_after.descriptors, hub_before.descriptors);
  EXPECT_LE(dialers_after.descriptors, dialers_before.descriptors);
  EXPECT_TRUE(hub.stop());
  std::vector<double> took;
  std::size_t errors = 0;
  for (const Dialer& dialer : dialers) {
    EXPECT_EQ(dialer.error, "");
    errors += dialer.error.empty() ? 0U : 1U;
    took.insert(took.end(), dialer.took.begin(), dialer.took.end());
  }
  ASSERT_FALSE(took.empty());
  std::ranges::sort(took);
  std::printf(
      "%zu of %zu connects in %.1f s, %zu at a time, %zu errors: median %.1f ms, 99 %% in %.1f ms, slowest %.1f ms\n",
      took.size(), count, lasted, dialers.size(), errors, took[took.size() / 2], took[took.size() * 99 / 100],
      took.back());
  print("hub", hub_before, hub_after);
  print("dialers", dialers_before, dialers_after);
}

}  // namespace
}  // namespace kvferry::load
