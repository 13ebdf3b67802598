// SPDX-License-Identifier: Apache-2.0
// A channel's statistics.
#include <gtest/gtest.h>

#include <array>
#include <mutex>

#include "channel_pair.hpp"
#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

struct ConnectedPair {
  explicit ConnectedPair(std::size_t page_count, const TcpOptions& options = {})
      : a(page_count, options, false), b(page_count, options) {
    a.fill(1);
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }

  Node a;
  Node b;
};

TEST(Stats, EveryKindOfTransferIsCountedWhereItWasCalledFor) {
  ConnectedPair pair(8);
  const auto eight = indexes(8);
  pair.a.channel->batched_write(pair.a.pages(8), {.peer_id = "b", .remote_indexes = eight});
  pair.a.channel->batched_write({}, {.peer_id = "b"});
  pair.a.channel->batched_read({pair.a.page(0, 100), pair.a.page(1, 7)},
                               {.peer_id = "b", .remote_indexes = std::span(eight).first(2)});
  auto receiving = pair.b.channel->async_batched_recv(pair.b.pages(3), {.peer_id = "a"}, asio::use_future);
  pair.a.channel->batched_send({pair.a.page(0), pair.a.page(1, 0), pair.a.page(2, 33)}, {.peer_id = "b"});
  EXPECT_EQ(receiving.get(), 3U);

  const ChannelStats a = pair.a.channel->stats();
  EXPECT_EQ(a.transport, "tcp");
  EXPECT_EQ(a.connected_peers, 1U);
  EXPECT_EQ(a.of(TransferKind::write).succeeded, 2U);
  EXPECT_EQ(a.of(TransferKind::write).objects, 8U);
  EXPECT_EQ(a.of(TransferKind::write).bytes, 8 * page_size);
  EXPECT_EQ(a.of(TransferKind::write).latency.count(), 2U);
  EXPECT_GT(a.of(TransferKind::write).latency.sum.count(), 0);
  EXPECT_EQ(a.of(TransferKind::read).succeeded, 1U);
  EXPECT_EQ(a.of(TransferKind::read).objects, 2U);
  EXPECT_EQ(a.of(TransferKind::read).bytes, 107U);
  EXPECT_EQ(a.of(TransferKind::send).objects, 3U);
  EXPECT_EQ(a.of(TransferKind::send).bytes, page_size + 33);
  EXPECT_EQ(a.of(TransferKind::recv).started, 0U);

  const ChannelStats b = pair.b.channel->stats();
  EXPECT_EQ(b.of(TransferKind::recv).succeeded, 1U);
  EXPECT_EQ(b.of(TransferKind::recv).objects, 3U);
  EXPECT_EQ(b.of(TransferKind::recv).bytes, page_size + 33) << "of the objects, not of the buffers";
  EXPECT_EQ(b.of(TransferKind::write).started, 0U);
}

TEST(Stats, WhatIsUnderWayIsInFlightUntilItFails) {
  ConnectedPair pair(2);
  auto receiving = pair.a.channel->async_batched_recv(pair.a.pages(2), {.peer_id = "b"}, asio::use_future);
  EXPECT_EQ(pair.a.channel->stats().of(TransferKind::recv).in_flight(), 1U);
  pair.a.channel->close();
  EXPECT_THROW(receiving.get(), std::system_error);

  const ChannelStats stats = pair.a.channel->stats();
  const TransferStats& recvs = stats.of(TransferKind::recv);
  EXPECT_EQ(stats.connected_peers, 0U);
  EXPECT_EQ(recvs.in_flight(), 0U);
  EXPECT_EQ(recvs.succeeded, 0U);
  EXPECT_EQ(recvs.objects, 0U);
  ASSERT_EQ(recvs.failures.size(), 1U);
  EXPECT_EQ(recvs.failures[0].cause, errc::closed);
  EXPECT_EQ(recvs.latency.count(), 0U);
}

TEST(Stats, FailuresAreCountedByCause) {
  ConnectedPair pair(2);
  const std::uint64_t beyond = 9;
  std::error_code ec;
  pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "b", .remote_indexes = {&beyond, 1}}, ec);
  pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "b", .remote_indexes = {&beyond, 1}}, ec);
  pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "nobody", .remote_indexes = {&beyond, 1}}, ec);
  const auto writes = pair.a.channel->stats().of(TransferKind::write);
  EXPECT_EQ(writes.failed(), 3U);
  ASSERT_EQ(writes.failures.size(), 2U);
  const bool ordered = writes.failures[0].operations == 2;
  EXPECT_EQ(writes.failures[ordered ? 0 : 1].cause, errc::index_out_of_range);
  EXPECT_EQ(writes.failures[ordered ? 0 : 1].operations, 2U);
  EXPECT_EQ(writes.failures[ordered ? 1 : 0].operations, 1U);
}

TEST(Stats, ARecvThatIsTooSmallCountsWhatArrived) {
  ConnectedPair pair(4);
  auto receiving =
      pair.b.channel->async_batched_recv({pair.b.page(0), pair.b.page(1, 10)}, {.peer_id = "a"}, asio::use_future);
  std::error_code ec;
  pair.a.channel->batched_send(pair.a.pages(2), {.peer_id = "b"}, ec);
  EXPECT_EQ(ec, errc::buffer_too_small);
  EXPECT_THROW(receiving.get(), std::system_error);
  const auto recvs = pair.b.channel->stats().of(TransferKind::recv);
  EXPECT_EQ(recvs.failed(), 1U);
  EXPECT_EQ(recvs.objects, 1U);
  EXPECT_EQ(recvs.bytes, page_size);
}

/// The one peer that a channel knows; nothing if it knows another number of them.
std::optional<PeerStats> only_peer(const ChannelStats& stats) {
  return stats.peers.size() == 1 ? std::optional(stats.peers.front()) : std::nullopt;
}

TEST(Stats, HandshakesAreCountedByOutcomeAndOperationsByPeer) {
  ConnectedPair pair(4);
  const auto two = indexes(2);
  pair.a.channel->batched_write(pair.a.pages(2), {.peer_id = "b", .remote_indexes = two});
  std::error_code ec;
  pair.a.channel->batched_recv(pair.a.pages(1), {.peer_id = "b", .timeout = std::chrono::milliseconds(1)}, ec);
  EXPECT_EQ(ec, errc::timed_out);

  const ChannelStats a = pair.a.channel->stats();
  EXPECT_EQ(a.handshakes.dialed, 1U);
  EXPECT_EQ(a.handshakes.accepted, 0U);
  EXPECT_EQ(a.handshakes.reconnected, 0U);
  EXPECT_TRUE(a.handshakes.failed.empty());
  const auto peer = only_peer(a);
  ASSERT_TRUE(peer);
  EXPECT_EQ(peer->id, "b");
  EXPECT_TRUE(peer->connected);
  EXPECT_EQ(peer->connects, 1U);
  EXPECT_EQ(peer->succeeded, 1U);
  EXPECT_EQ(peer->failed, 1U);
  EXPECT_EQ(peer->bytes, 2 * page_size);

  const ChannelStats b = pair.b.channel->stats();
  EXPECT_EQ(b.handshakes.dialed, 0U);
  EXPECT_EQ(b.handshakes.accepted, 1U);
  ASSERT_TRUE(only_peer(b));
  EXPECT_EQ(only_peer(b)->id, "a");
  EXPECT_EQ(only_peer(b)->bytes, 0U) << "a's writes are a's operations";
}

TEST(Stats, AReconnectIsCounted) {
  RelayedPair pair(2);
  const std::uint64_t page = 0;
  std::error_code ec;
  pair.relay.half_close();
  // The first calls may be told of the break; one of the next reconnects.
  const auto deadline = std::chrono::steady_clock::now() + long_enough;
  do {
    pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "b", .remote_indexes = {&page, 1}}, ec);
  } while (ec && std::chrono::steady_clock::now() < deadline);
  EXPECT_FALSE(ec) << ec.message();
  const ChannelStats stats = pair.a.channel->stats();
  EXPECT_EQ(stats.handshakes.dialed, 2U);
  EXPECT_EQ(stats.handshakes.reconnected, 1U);
  ASSERT_TRUE(only_peer(stats));
  EXPECT_EQ(only_peer(stats)->connects, 2U);
}

TEST(Stats, AHandshakeThatIsRefusedIsCountedOnBothSidesAndLogged) {
  std::mutex mutex;
  std::vector<std::string> events;
  TcpOptions listening;
  listening.log_sink = [&](const LogRecord& record) {
    const std::lock_guard lock(mutex);
    events.push_back(std::string(record.event) + ' ' + std::string(record.peer));
  };
  listening.max_peers = 1;
  Node b(4, listening);
  Node first(4);
  (void)first.channel->lazy_init_peer_connection("first", "b", b.channel->peer_init_url());
  TcpTransferChannel a(kvferry_test::patient(TcpOptions{}));
  std::error_code ec;
  (void)a.lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {}, ec);
  EXPECT_EQ(ec, errc::resource_limit);

  const HandshakeStats asked = a.stats().handshakes;
  ASSERT_EQ(asked.failed.size(), 1U);
  EXPECT_EQ(asked.failed[0].cause, errc::resource_limit);
  EXPECT_EQ(asked.failed[0].count, 1U);
  const HandshakeStats answered = b.channel->stats().handshakes;
  ASSERT_EQ(answered.refused.size(), 1U);
  EXPECT_EQ(answered.refused[0].cause, errc::resource_limit);
  b.channel->close();
  const std::lock_guard lock(mutex);
  EXPECT_NE(std::ranges::find(events, "handshake_refused a"), events.end());
}

TEST(Stats, TheLifeOfAConnectionIsLogged) {
  std::mutex mutex;
  std::vector<std::string> events;
  TcpOptions options;
  options.log_sink = [&](const LogRecord& record) {
    const std::lock_guard lock(mutex);
    events.push_back(std::string(record.event) + ' ' + std::string(record.peer));
  };
  {
    Node b(4);
    Node a(4, options, false);
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
    auto receiving = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
    b.channel->close();
    EXPECT_THROW(receiving.get(), std::system_error);  // the connection is gone: this side has noticed
  }
  const std::lock_guard lock(mutex);
  const std::vector<std::string> expected{"channel_opened ", "peer_connected b", "peer_lost b", "channel_closed "};
  EXPECT_EQ(events, expected);
}

TEST(Stats, AChannelThatCouldNotBeMadeIsNotLoggedAsClosed) {
  std::mutex mutex;
  std::vector<std::string> events;
  TcpOptions options;
  options.log_sink = [&](const LogRecord& record) {
    const std::lock_guard lock(mutex);
    events.emplace_back(record.event);
  };
  const Node other(1);
  options.peer_init_url = other.channel->peer_init_url();
  EXPECT_THROW(TcpTransferChannel{options}, TransferError);
  const std::lock_guard lock(mutex);
  EXPECT_EQ(events, std::vector<std::string>());
}

TEST(Stats, OneServerUnderTwoIdsIsLogged) {
  std::mutex mutex;
  std::vector<std::string> conflicts;
  TcpOptions options;
  options.log_sink = [&](const LogRecord& record) {
    const std::lock_guard lock(mutex);
    if (record.event == "identity_conflict") {
      conflicts.push_back(std::string(record.peer) + ": " + std::string(record.text));
    }
  };
  Node b(4);
  Node a(4, options, false);
  for (const char* id : {"b", "also-b"}) {
    std::error_code ec;
    (void)a.channel->lazy_init_peer_connection("a", id, b.channel->peer_init_url(), {}, {}, ec);
    EXPECT_FALSE(ec) << ec.message();
  }
  const std::lock_guard lock(mutex);
  ASSERT_EQ(conflicts.size(), 1U);
  EXPECT_NE(conflicts[0].find("also-b: "), std::string::npos) << conflicts[0];
  EXPECT_NE(conflicts[0].find("'b'"), std::string::npos) << conflicts[0];
}

TEST(Stats, NotificationsThatWaitAreCounted) {
  ConnectedPair pair(2);
  const std::uint64_t page = 0;
  const std::array<std::byte, 3> text{};
  pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "b", .remote_indexes = {&page, 1}, .notification = text});
  EXPECT_EQ(pair.b.channel->stats().pending_notifications, 1U);
  (void)pair.b.channel->receive_notification(long_enough);
  EXPECT_EQ(pair.b.channel->stats().pending_notifications, 0U);
}

TEST(Stats, BytesAreCountedByLane) {
  TcpOptions options;
  options.lanes_per_peer = 3;
  options.stripe_threshold = 64 * page_size;
  constexpr std::size_t count = 96;
  ConnectedPair pair(count, options);
  const auto all = indexes(count);
  pair.a.channel->batched_write(pair.a.pages(count), {.peer_id = "b", .remote_indexes = all});
  const ChannelStats sender = pair.a.channel->stats();
  const ChannelStats receiver = pair.b.channel->stats();
  ASSERT_EQ(sender.paths.size(), 3U);
  ASSERT_EQ(receiver.paths.size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(sender.paths[i].name, "lane " + std::to_string(i));
    EXPECT_GT(sender.paths[i].bytes_out, count / 3 * page_size);
    EXPECT_LT(sender.paths[i].bytes_out, count / 3 * page_size * 11 / 10);
    EXPECT_EQ(receiver.paths[i].bytes_in, sender.paths[i].bytes_out);
    EXPECT_GT(sender.paths[i].bytes_in, 0U);
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
