// SPDX-License-Identifier: Apache-2.0
// Options of which each has to reach the part that keeps it.
#include <gtest/gtest.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include "channel_pair.hpp"
#include "common/half_frame.hpp"
#include "common/open_descriptors.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using HalfTcpFrame = kvferry::testing::HalfFrame<TcpTransferChannel, TcpOptions>;

TEST(FrameTimeout, EndsAConnectionOnWhichAFrameStops) {
  HalfTcpFrame half({}, std::chrono::milliseconds(50));
  EXPECT_EQ(half.gone(long_enough), errc::connection_lost);
  const std::string why = half.why();
  EXPECT_NE(why.find("stopped within a frame"), std::string::npos) << why;
  EXPECT_NE(why.find(" in 50 ms"), std::string::npos) << why;
  EXPECT_EQ(half.go_on(), condition::peer_failed);
}

TEST(FrameTimeout, IsTenMillisecondsAtLeast) {
  HalfTcpFrame half({}, std::chrono::milliseconds(0));
  EXPECT_EQ(half.gone(long_enough), errc::connection_lost);
  const std::string why = half.why();
  EXPECT_NE(why.find(" in 10 ms"), std::string::npos) << why;
}

TEST(FrameTimeout, OfForEverIsNotOver) {
  HalfTcpFrame half({}, std::chrono::milliseconds::max());
  EXPECT_FALSE(half.gone(std::chrono::milliseconds(100)));
  EXPECT_FALSE(half.landed());
  EXPECT_FALSE(half.go_on());
  EXPECT_TRUE(half.landed());
}

/// Of the connections that a channel with this option has, when they are probed; 0: never.
std::set<int> seconds_until_probed(std::chrono::seconds idle) {
  TcpOptions options;
  options.keepalive_idle = idle;
  Node a(1, options, false);
  Node b(1, options);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  const std::string path = a.channel->peer_info("b")->path;
  std::set<int> found;
  for (const auto& [descriptor, what] : kvferry_test::open_descriptors()) {
    sockaddr_in address{};
    socklen_t size = sizeof(address);
    if (::getpeername(descriptor, reinterpret_cast<sockaddr*>(&address), &size) != 0 || address.sin_family != AF_INET ||
        path.find(":" + std::to_string(ntohs(address.sin_port))) == std::string::npos) {
      continue;
    }
    int probed = 0;
    int seconds = 0;
    size = sizeof(int);
    EXPECT_EQ(::getsockopt(descriptor, SOL_SOCKET, SO_KEEPALIVE, &probed, &size), 0);
    EXPECT_EQ(::getsockopt(descriptor, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, &size), 0);
    found.insert(probed != 0 ? seconds : 0);
  }
  return found;
}

TEST(KeepaliveIdle, IsAnHourAtMost) {
  EXPECT_EQ(seconds_until_probed(std::chrono::seconds(70)), std::set{70});
  EXPECT_EQ(seconds_until_probed(std::chrono::seconds(0)), std::set{0});
  EXPECT_EQ(seconds_until_probed(std::chrono::seconds(32'768)), std::set{3600}) << "TCP_KEEPIDLE takes less";
  EXPECT_EQ(seconds_until_probed(std::chrono::seconds::max()), std::set{3600});
  EXPECT_EQ(seconds_until_probed(std::chrono::seconds::min()), std::set{0});
}

/// How many notifications of 500 bytes find room, each of which counts as 629: it has 128 for keeping it, and its peer's id has one.
std::size_t notifications_taken(TcpOptions options) {
  Node b(1, std::move(options));
  Node a(1, {}, false);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  const std::vector<std::byte> payload(500);
  std::error_code ec;
  std::size_t taken = 0;
  for (; taken < 20; ++taken) {
    a.channel->notify("b", payload, {}, ec);
    if (ec) {
      EXPECT_EQ(ec, errc::resource_limit);
      break;
    }
  }
  return taken;
}

TEST(NotificationBytes, AreBoundedInAllAndOfOnePeer) {
  EXPECT_EQ(notifications_taken({}), 20U);
  TcpOptions of_all;
  of_all.max_pending_notification_bytes = 3 * 629;
  EXPECT_EQ(notifications_taken(of_all), 3U);
  --of_all.max_pending_notification_bytes;
  EXPECT_EQ(notifications_taken(of_all), 2U);
  TcpOptions of_peer;
  of_peer.max_pending_notification_bytes_of_peer = 5 * 629;
  EXPECT_EQ(notifications_taken(of_peer), 5U);
  --of_peer.max_pending_notification_bytes_of_peer;
  EXPECT_EQ(notifications_taken(of_peer), 4U);
}

TEST(LocalMetadata, AtAWildcardTakesAnAdvertisedUrl) {
  TcpOptions options;
  options.peer_init_url = "tcp://0.0.0.0:0";
  {
    const Node b(1, options);
    try {
      (void)b.channel->local_metadata("b");
      ADD_FAILURE() << "others can't connect to 0.0.0.0";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::not_supported);
      EXPECT_NE(std::string(error.what()).find("advertised_init_url"), std::string::npos) << error.what();
    }
  }
  options.advertised_init_url = "tcp://127.0.0.1:0";
  const Node b(1, options);
  Node a(1, {}, false);
  const PeerInfo info = a.channel->connect("a", b.channel->local_metadata("b"));
  EXPECT_EQ(info.id, "b");
  EXPECT_TRUE(info.init_url.starts_with("tcp://127.0.0.1:")) << info.init_url;
}

TEST(NumberOfIoThreads, IsBounded) {
  for (const std::size_t count : {std::size_t{1025}, std::size_t{100'000}, ~std::size_t{0}}) {
    TcpOptions options;
    options.io_threads = count;
    try {
      const TcpTransferChannel channel(options);
      ADD_FAILURE() << "a channel of " << count << " threads";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), std::errc::invalid_argument);
      EXPECT_NE(std::string(error.what()).find("io_threads is " + std::to_string(count)), std::string::npos)
          << error.what();
    }
  }
  TcpOptions options;
  options.io_threads = 0;
  const TcpTransferChannel channel(options);
  EXPECT_EQ(channel.transport(), "tcp");
}

}  // namespace
}  // namespace kvferry::tcp::testing
