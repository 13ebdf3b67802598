// SPDX-License-Identifier: Apache-2.0
// Hosts that say nothing any more, neither that they are there nor that they are gone.
#include <gtest/gtest.h>

#include <linux/filter.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <future>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"
#include "common/open_descriptors.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// Has the kernel drop all that arrives on the connections that this process accepted at a port, acknowledgements
/// included: for who sends there, the host is gone. Connections that are made later are not concerned.
class LostPackets {
 public:
  explicit LostPackets(std::uint16_t port) {
    for (const auto& [descriptor, what] : kvferry_test::open_descriptors()) {
      sockaddr_in local{};
      socklen_t size = sizeof(local);
      sockaddr_in remote{};
      socklen_t remote_size = sizeof(remote);
      if (::getsockname(descriptor, reinterpret_cast<sockaddr*>(&local), &size) == 0 && local.sin_family == AF_INET &&
          ntohs(local.sin_port) == port &&
          ::getpeername(descriptor, reinterpret_cast<sockaddr*>(&remote), &remote_size) == 0) {
        sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
        const sock_fprog program{1, &drop};
        EXPECT_EQ(::setsockopt(descriptor, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)), 0);
        ++connections_;
      }
    }
  }
  [[nodiscard]] int connections() const noexcept { return connections_; }

 private:
  int connections_ = 0;
};

struct DeadHost : ::testing::Test {
  static constexpr std::size_t pages = 16384;

  void connect(TcpOptions options) {
    a.emplace(pages, std::move(options), false);
    a->channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }
  /// The kernel doesn't find the connection dead by itself.
  void connect_without_the_kernels_help() {
    TcpOptions options;
    options.user_timeout = milliseconds(0);
    options.keepalive_idle = std::chrono::seconds(0);
    connect(std::move(options));
  }
  [[nodiscard]] std::uint64_t sent() const {
    std::uint64_t bytes = 0;
    for (const PathStats& path : a->channel->stats().paths) {
      bytes += path.bytes_out;
    }
    return bytes;
  }

  /// Whether the kernel takes much more on a's connection to b.
  [[nodiscard]] bool has_room() const {
    for (const auto& [descriptor, what] : kvferry_test::open_descriptors()) {
      sockaddr_in remote{};
      socklen_t size = sizeof(remote);
      pollfd writable{descriptor, POLLOUT, 0};
      if (::getpeername(descriptor, reinterpret_cast<sockaddr*>(&remote), &size) == 0 && remote.sin_family == AF_INET &&
          ntohs(remote.sin_port) == b.channel->data_port() && ::poll(&writable, 1, 0) == 1 &&
          (writable.revents & POLLOUT) != 0) {
        return true;
      }
    }
    return false;
  }

  Node b{pages};
  std::optional<Node> a;
};

std::error_code outcome_of(std::future<std::size_t>& operation) {
  if (operation.wait_for(long_enough) != std::future_status::ready) {
    ADD_FAILURE() << "it waits for its deadline";
    return {};
  }
  try {
    operation.get();
  } catch (const std::system_error& error) {
    return error.code();
  }
  return {};
}

TEST_F(DeadHost, AnOperationThatGetsNothingOutFindsItsConnectionDead) {
  connect_without_the_kernels_help();
  const LostPackets lost(b.channel->data_port());
  ASSERT_EQ(lost.connections(), 1);
  const auto all = indexes(pages);
  auto patient = a->channel->async_batched_write(
      a->pages(pages), {.peer_id = "b", .remote_indexes = all, .timeout = std::chrono::minutes(5)}, asio::use_future);
  // Until the socket is full: then nothing of what follows gets into it. A thread that is to fill it may stand still meanwhile.
  std::uint64_t before = 0;
  for (int same = 0; same < 20; same = sent() == before && !has_room() ? same + 1 : 0) {
    before = sent();
    std::error_code ec;
    a->channel->batched_recv(a->pages(1), {.peer_id = "b", .tag = 1, .timeout = milliseconds(10)}, ec);
  }
  std::error_code ec;
  a->channel->batched_write(a->pages(1), {.peer_id = "b", .remote_indexes = indexes(1), .timeout = milliseconds(1200)}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  EXPECT_EQ(outcome_of(patient), errc::connection_lost);
  EXPECT_EQ(a->channel->batched_write(a->pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
}

TEST_F(DeadHost, WhatNobodyAcknowledgesEndsAfterTheUserTimeout) {
  TcpOptions options;
  options.user_timeout = milliseconds(500);
  connect(options);
  const LostPackets lost(b.channel->data_port());
  ASSERT_EQ(lost.connections(), 1);
  auto write = a->channel->async_batched_write(
      a->pages(4), {.peer_id = "b", .remote_indexes = indexes(4), .timeout = std::chrono::minutes(5)}, asio::use_future);
  const auto ec = outcome_of(write);
  EXPECT_EQ(ec, errc::connection_lost);
  EXPECT_EQ(ec, condition::retryable);
  EXPECT_EQ(a->channel->batched_write(a->pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
}

TEST_F(DeadHost, WhoOnlyWaitsIsToldAsWell) {
  TcpOptions options;
  options.user_timeout = milliseconds(2000);
  options.keepalive_idle = std::chrono::seconds(1);
  connect(options);
  auto recv = a->channel->async_batched_recv(
      a->pages(1), {.peer_id = "b", .tag = 1, .timeout = std::chrono::minutes(5)}, asio::use_future);
  // Behind the recv, so that all of it has been acknowledged and the connection is idle.
  EXPECT_EQ(a->channel->batched_write(a->pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
  const LostPackets lost(b.channel->data_port());
  ASSERT_EQ(lost.connections(), 1);
  EXPECT_EQ(outcome_of(recv), errc::connection_lost);
}

TEST_F(DeadHost, WhoIsSaidToBeElsewhereIsConnectedToAnewBeforeTheCallEnds) {
  connect_without_the_kernels_help();
  const LostPackets lost(b.channel->data_port());
  ASSERT_EQ(lost.connections(), 1);
  std::string here = b.channel->peer_init_url();
  std::string elsewhere = here;
  elsewhere.replace(elsewhere.find("127.0.0.1"), 9, "localhost");
  a->channel->lazy_init_peer_connection("a", "b", elsewhere);
  std::error_code ec;
  a->channel->batched_write(a->pages(1), {.peer_id = "b", .remote_indexes = indexes(1), .timeout = long_enough}, ec);
  EXPECT_FALSE(ec) << "the old connection was taken for a living one: " << ec.message();
  EXPECT_EQ(a->channel->stats().handshakes.reconnected, 1U);
  // A connection that lives stays. A busy machine may keep the peer from answering within the second that it has: then once more.
  std::uint64_t before = 0;
  std::uint64_t after = 1;
  for (bool in_time = false; before != after && !in_time;) {
    before = a->channel->stats().handshakes.reconnected;
    elsewhere.swap(here);
    const SecondToAnswer second;
    a->channel->lazy_init_peer_connection("a", "b", elsewhere);
    in_time = !second.is_over();
    after = a->channel->stats().handshakes.reconnected;
  }
  EXPECT_EQ(after, before);
}

}  // namespace
}  // namespace kvferry::tcp::testing
