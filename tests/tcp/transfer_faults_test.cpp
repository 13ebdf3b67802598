// SPDX-License-Identifier: Apache-2.0
// Faults of transfers over a network that stalls, breaks and lies: lines 10 to 18 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <optional>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include "channel_pair.hpp"
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

bool same(const Node& x, const Node& y) { return x.memory == y.memory; }

TEST(TransferFaults, Line10_AnEmptyOrSenselessBatchMakesNoTraffic) {
  RelayedPair pair(8);
  const auto before = pair.relay.bytes();
  TcpTransferChannel& channel = *pair.a.channel;
  EXPECT_EQ(channel.batched_write({}, {.peer_id = "b"}), 0U);
  EXPECT_EQ(channel.batched_read({}, {.peer_id = "b"}), 0U);
  EXPECT_EQ(channel.batched_send({}, {.peer_id = "b"}), 0U);
  EXPECT_EQ(channel.batched_recv({}, {.peer_id = "b"}), 0U);
  std::error_code ec;
  const auto two = indexes(2);
  EXPECT_EQ(channel.batched_write(pair.a.pages(3), {.peer_id = "b", .remote_indexes = two}, ec), 0U);
  EXPECT_EQ(ec, errc::count_mismatch);
  std::vector<std::error_code> statuses(2);
  const auto three = indexes(3);
  std::string diagnostic;
  EXPECT_EQ(channel.batched_read(
                pair.a.pages(3),
                {.peer_id = "b", .remote_indexes = three, .statuses = statuses, .diagnostic = &diagnostic}, ec),
            0U);
  EXPECT_EQ(ec, errc::count_mismatch);
  EXPECT_NE(diagnostic.find("'b'"), std::string::npos) << diagnostic;
  EXPECT_NE(diagnostic.find("3 objects, 2 statuses"), std::string::npos) << diagnostic;
  EXPECT_EQ(pair.relay.bytes(), before);
}

TEST(TransferFaults, Line11_BoundsAreCheckedBeforeAnyTraffic) {
  RelayedPair pair(8);
  const auto before = pair.relay.bytes();
  for (const std::uint64_t index : {std::uint64_t{8}, ~std::uint64_t{0}, std::uint64_t{1} << 52}) {
    std::error_code ec;
    pair.a.channel->batched_write(pair.a.pages(1), {.peer_id = "b", .remote_indexes = {&index, 1}}, ec);
    EXPECT_EQ(ec, errc::index_out_of_range);
    EXPECT_EQ(ec, condition::invalid_argument);
  }
  EXPECT_EQ(pair.relay.bytes(), before);
}

TEST(TransferFaults, Line11_TooManyObjectsForASendAreToldFromTooManyForNow) {
  RelayedPair pair(1);
  const auto before = pair.relay.bytes();
  const std::vector<ConstBuffer> many((std::size_t{1} << 20) + 1);
  std::string diagnostic;
  std::error_code ec;
  pair.a.channel->batched_send(many, {.peer_id = "b", .diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, std::errc::argument_list_too_long);
  EXPECT_EQ(ec, condition::invalid_argument);
  EXPECT_NE(ec, condition::retryable);
  EXPECT_NE(diagnostic.find("1048577 objects, at most 1048576"), std::string::npos) << diagnostic;
  EXPECT_EQ(pair.relay.bytes(), before);
}

/// @return how many objects landed of a batch whose connection is cut on the way.
std::size_t landed_before_the_cut() {
  constexpr std::size_t count = 4096;
  RelayedPair pair(count);
  pair.a.fill(1);
  pair.relay.cut_after(5 * max_chunk_bytes);
  std::vector<std::error_code> statuses(count);
  std::string diagnostic;
  std::error_code ec;
  const auto all = indexes(count);
  const std::size_t landed = pair.a.channel->batched_write(
      pair.a.pages(count),
      {.peer_id = "b", .remote_indexes = all, .statuses = statuses, .diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  EXPECT_EQ(ec, condition::retryable);
  EXPECT_LT(landed, count);
  std::size_t succeeded = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (!statuses[i]) {
      ++succeeded;
      EXPECT_TRUE(std::ranges::equal(pair.a.page(i), pair.b->page(i)));
    } else {
      EXPECT_EQ(statuses[i], ec);
    }
  }
  EXPECT_EQ(succeeded, landed);
  EXPECT_NE(diagnostic.find("'b'"), std::string::npos) << diagnostic;
  return landed;
}

TEST(TransferFaults, Line12_OnlyObjectsThatLandedAreCounted) {
  // The cut may come before the first answer.
  std::size_t landed = 0;
  for (int round = 0; round < 50 && landed == 0; ++round) {
    landed = landed_before_the_cut();
  }
  EXPECT_GT(landed, 0U);
}

TEST(TransferFaults, Line13_AfterTheDeadlineBuffersAreQuiet) {
  constexpr std::size_t count = 4096;
  std::optional<RelayedPair> pair;
  const auto all = indexes(count);
  // The answer is under way when the network stalls, within a frame: what came of it by the deadline has to be seen.
  bool came = false;
  for (milliseconds timeout(200); !came; timeout *= 2) {
    ASSERT_LT(timeout, long_enough);
    pair.emplace(count);  // the rest of the last try's answer is not to come here
    pair->b->fill(2);
    pair->relay.pause_after(3 * max_chunk_bytes + max_chunk_bytes / 2);
    std::error_code ec;
    const auto began = std::chrono::steady_clock::now();
    pair->a.channel->batched_read(pair->a.pages(count), {.peer_id = "b", .remote_indexes = all, .timeout = timeout},
                                  ec);
    EXPECT_EQ(ec, errc::timed_out);
    EXPECT_EQ(ec, condition::timed_out);
    EXPECT_LT(std::chrono::steady_clock::now() - began, 2 * long_enough);
    const std::size_t in_fourth = 3 * max_chunk_bytes / page_size + 1;
    came = std::ranges::equal(pair->a.page(in_fourth), pair->b->page(in_fourth));
    EXPECT_FALSE(std::ranges::equal(pair->a.page(count - 1), pair->b->page(count - 1)));
  }
  std::ranges::fill(pair->a.memory, std::byte{0x5a});
  pair->relay.resume();
  // Traffic behind the stalled answer: once it has come through, the answer would have, too.
  EXPECT_EQ(pair->a.channel->batched_write(pair->a.pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
  EXPECT_TRUE(std::ranges::all_of(pair->a.memory, [](std::byte byte) { return byte == std::byte{0x5a}; }));
  EXPECT_EQ(pair->relay.connections(), 1) << "it was to be the connection of the read";
}

TEST(TransferFaults, Line13_AWriteThatStallsHalfOutEndsSoonAfterItsDeadline) {
  constexpr std::size_t count = 32768;
  RelayedPair pair(count);
  pair.relay.pause();
  const auto all = indexes(count);
  // On a busy machine nothing of it may be sent in a short time.
  std::error_code ended = errc::timed_out;
  for (milliseconds timeout(200); ended == errc::timed_out; timeout *= 4) {
    ASSERT_LT(timeout, long_enough);
    auto first = pair.a.channel->async_batched_write(
        pair.a.pages(count), {.peer_id = "b", .remote_indexes = all, .timeout = timeout}, asio::use_future);
    ASSERT_EQ(first.wait_for(timeout + long_enough), std::future_status::ready);
    try {
      first.get();
      FAIL() << "a write that can't have arrived succeeded";
    } catch (const std::system_error& error) {
      ended = error.code();
    }
  }
  EXPECT_EQ(ended, errc::timed_out_in_flight);
  EXPECT_EQ(ended, condition::timed_out);
  EXPECT_EQ(ended, condition::may_still_land);
  // The connection had bytes of it half out, so it was given up; the next call makes a new one.
  pair.relay.resume();
  pair.a.fill(3);
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.pages(count), {.peer_id = "b", .remote_indexes = all}), count);
  EXPECT_TRUE(same(pair.a, *pair.b));
  EXPECT_EQ(pair.relay.connections(), 2);
}

TEST(TransferFaults, Line14_AWriteIsNotDoneWhileItIsInASocketBuffer) {
  RelayedPair pair(4);
  pair.a.fill(4);
  pair.relay.pause();
  auto write = pair.a.channel->async_batched_write(pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)},
                                                   asio::use_future);
  // All of it fits the socket's buffer; a second write, which times out, shows that time has passed.
  std::error_code ec;
  pair.a.channel->batched_recv(pair.a.pages(1), {.peer_id = "b", .tag = 1, .timeout = milliseconds(100)}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  EXPECT_EQ(write.wait_for(milliseconds(0)), std::future_status::timeout);
  EXPECT_FALSE(same(pair.a, *pair.b));
  pair.relay.resume();
  EXPECT_EQ(write.get(), 4U);
  EXPECT_TRUE(same(pair.a, *pair.b));
}

TEST(TransferFaults, Line15_AFullQueueRefusesAndHarmsNothing) {
  TcpOptions options;
  options.max_pending_operations = 4;
  RelayedPair pair(4, std::move(options));
  pair.a.fill(5);
  pair.relay.pause();
  std::vector<std::future<std::size_t>> pending;
  for (int i = 0; i < 4; ++i) {
    pending.push_back(pair.a.channel->async_batched_write(
        pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}, asio::use_future));
  }
  std::error_code ec;
  pair.a.channel->batched_write(pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}, ec);
  EXPECT_EQ(ec, errc::resource_limit);
  EXPECT_EQ(ec, condition::retryable);
  pair.relay.resume();
  for (auto& write : pending) {
    EXPECT_EQ(write.get(), 4U);
  }
  EXPECT_TRUE(same(pair.a, *pair.b));
}

TEST(TransferFaults, Line15_TwentyFourPeersTakeNoThreadEach) {
  const auto threads = [] {
    return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
  };
  Node hub(24);
  std::vector<std::unique_ptr<Node>> peers;
  for (int i = 0; i < 24; ++i) {
    peers.push_back(std::make_unique<Node>(24));
    peers.back()->fill(static_cast<unsigned>(i));
  }
  const auto before = threads();
  std::vector<std::future<std::size_t>> writes;
  for (std::size_t i = 0; i < peers.size(); ++i) {
    const std::string id = "peer " + std::to_string(i);
    hub.channel->lazy_init_peer_connection("hub", id, peers[i]->channel->peer_init_url());
    peers[i]->channel->lazy_init_peer_connection(id, "hub", hub.channel->peer_init_url());
    const std::uint64_t page = i;
    writes.push_back(peers[i]->channel->async_batched_write(
        {peers[i]->page(0)}, {.peer_id = "hub", .remote_indexes = {&page, 1}},
        asio::bind_executor(hub.channel->get_executor(), asio::use_future)));
  }
  for (std::size_t i = 0; i < peers.size(); ++i) {
    EXPECT_EQ(writes[i].get(), 1U);
    EXPECT_TRUE(std::ranges::equal(hub.page(i), peers[i]->page(0)));
  }
  EXPECT_EQ(threads(), before);
}

TEST(TransferFaults, Line16_NothingBlocksTheCallersExecutor) {
  constexpr std::size_t count = 32768;
  asio::io_context context;
  TcpOptions options;
  options.executor = context.get_executor();
  std::optional<RelayedPair> pair;
  std::thread runner;
  {
    auto work = asio::make_work_guard(context);
    runner = std::thread([&] { context.run(); });
    pair.emplace(count, std::move(options));
    pair->relay.pause();
    // More than the sockets' buffers take, started on the only thread: it has to come back, and run what is next.
    std::promise<std::future<std::size_t>> started;
    const auto all = indexes(count);
    asio::post(context, [&] {
      started.set_value(pair->a.channel->async_batched_write(
          pair->a.pages(count), {.peer_id = "b", .remote_indexes = all}, asio::use_future));
    });
    auto starting = started.get_future();
    ASSERT_EQ(starting.wait_for(long_enough), std::future_status::ready);
    auto write = starting.get();
    std::promise<void> ran;
    asio::post(context, [&] { ran.set_value(); });
    EXPECT_EQ(ran.get_future().wait_for(long_enough), std::future_status::ready);
    EXPECT_EQ(write.wait_for(milliseconds(0)), std::future_status::timeout);
    pair->relay.resume();
    EXPECT_EQ(write.get(), count);
    // A blocking form on the thread that would have to complete it is refused rather than left to hang.
    std::promise<std::error_code> refused;
    asio::post(context, [&] {
      std::error_code ec;
      pair->a.channel->batched_write(pair->a.pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}, ec);
      refused.set_value(ec);
    });
    EXPECT_EQ(refused.get_future().get(), errc::would_deadlock);
    pair->a.channel->close();
  }
  runner.join();
}

TEST(TransferFaults, Line17_AHalfClosedConnectionIsNoticedBeforeItIsUsed) {
  RelayedPair pair(4);
  pair.a.fill(6);
  auto closed = pair.relay.client_closed();
  pair.relay.half_close();
  ASSERT_EQ(closed.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  EXPECT_TRUE(same(pair.a, *pair.b));
  EXPECT_EQ(pair.relay.connections(), 2);
}

TEST(TransferFaults, Line17_ASilentlyDroppedConnectionIsNotUsedTwice) {
  RelayedPair pair(4);
  pair.a.fill(7);
  pair.relay.swallow();
  // On a busy machine nothing of it may be sent in a short time.
  std::error_code ec = errc::timed_out;
  for (milliseconds timeout(1200); ec == errc::timed_out; timeout *= 4) {
    ASSERT_LT(timeout, long_enough);
    pair.a.channel->batched_write(pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4), .timeout = timeout},
                                  ec);
  }
  EXPECT_EQ(ec, errc::timed_out_in_flight);
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  EXPECT_TRUE(same(pair.a, *pair.b));
}

TEST(TransferFaults, Line17_IdleConnectionsAreProbed) {
  RelayedPair pair(1);
  // /proc/net/tcp (proc(5)) has a connection's timer: 02 is keepalive.
  const std::string path = pair.a.channel->peer_info("b")->path;
  const std::string local = path.substr(path.find(':') + 1, path.find(" ->") - path.find(':') - 1);
  std::ostringstream address;
  address << "0100007F:" << std::uppercase << std::hex << std::setw(4) << std::setfill('0') << std::stoi(local);
  std::string timer;
  // Another one runs until the last bytes have been acknowledged.
  for (const auto until = std::chrono::steady_clock::now() + long_enough;
       !timer.starts_with("02:") && std::chrono::steady_clock::now() < until;) {
    std::ifstream table("/proc/net/tcp");
    std::string line;
    while (std::getline(table, line)) {
      std::istringstream fields(line);
      std::string slot;
      std::string from;
      std::string to;
      std::string state;
      std::string queues;
      std::string found;
      fields >> slot >> from >> to >> state >> queues >> found;
      if (from == address.str() && state == "01") {
        timer = found;
      }
    }
  }
  EXPECT_TRUE(timer.starts_with("02:")) << path << ", timer '" << timer << "'";
}

TEST(TransferFaults, Line18_ANotificationComesWithoutTheWritersHelp) {
  RelayedPair pair(1024);
  pair.a.fill(8);
  const std::vector<std::byte> note(5, std::byte{1});
  const auto all = indexes(1024);
  auto write = pair.a.channel->async_batched_write(
      pair.a.pages(1024), {.peer_id = "b", .remote_indexes = all, .notification = note}, asio::use_future);
  const Notification got = pair.b->channel->receive_notification(std::chrono::duration_cast<milliseconds>(long_enough));
  EXPECT_TRUE(same(pair.a, *pair.b));
  EXPECT_EQ(got.peer_id, "a");
  EXPECT_EQ(got.payload, note);
  EXPECT_EQ(write.get(), 1024U);
}

TEST(TransferFaults, ManyLanesCarryStripedBatchesAndTakeTurns) {
  TcpOptions options;
  options.lanes_per_peer = 4;
  options.stripe_threshold = 1 << 20;
  Node a(2048, options, false);
  Node b(2048, options);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_NE(a.channel->peer_info("b")->path.find("4 lanes"), std::string::npos);
  a.fill(9);
  const auto all = indexes(2048);
  const std::vector<std::byte> note(1, std::byte{7});
  // The least that has come in over any lane meanwhile.
  std::vector<std::uint64_t> before(4);
  const auto least_since = [&] {
    const auto paths = b.channel->stats().paths;
    std::uint64_t least = ~std::uint64_t{0};
    for (std::size_t lane = 0; lane < 4; ++lane) {
      const std::uint64_t now = paths.at(lane).bytes_in;
      least = std::min(least, now - std::exchange(before[lane], now));
    }
    return least;
  };
  (void)least_since();
  for (int round = 0; round < 10; ++round) {
    std::ranges::fill(b.memory, std::byte{0});
    auto write = a.channel->async_batched_write(
        a.pages(2048), {.peer_id = "b", .remote_indexes = all, .notification = note}, asio::use_future);
    (void)b.channel->receive_notification(std::chrono::duration_cast<milliseconds>(long_enough));
    EXPECT_TRUE(same(a, b)) << "the notification came before a lane's part";
    EXPECT_EQ(write.get(), 2048U);
    EXPECT_GE(least_since(), 512 * page_size) << "a write of all";
  }
  std::ranges::fill(b.memory, std::byte{0});
  EXPECT_EQ(b.channel->batched_read(b.pages(2048), {.peer_id = "a", .remote_indexes = all}), 2048U);
  EXPECT_TRUE(same(a, b));
  EXPECT_GE(least_since(), 512 * page_size) << "a read of all";
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(a.channel->batched_write(a.pages(16), {.peer_id = "b", .remote_indexes = indexes(16)}), 16U);
  }
  EXPECT_GE(least_since(), 16 * page_size) << "small writes";
}

}  // namespace
}  // namespace kvferry::tcp::testing
