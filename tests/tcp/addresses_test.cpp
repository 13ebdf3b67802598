// SPDX-License-Identifier: Apache-2.0
// Where a channel listens and dials, and how its sockets are set: line 9 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <netinet/tcp.h>
#include <sys/socket.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <array>
#include <fstream>
#include <string>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using namespace std::string_literals;

bool has_ipv6_loopback() {
  asio::io_context context;
  asio::ip::tcp::acceptor probe(context);
  std::error_code ec;
  probe.open(asio::ip::tcp::v6(), ec);
  if (!ec) {
    probe.bind({asio::ip::make_address("::1"), 0}, ec);
  }
  return !ec;
}

TEST(ConnectFaults, Line09_Ipv6) {
  if (!has_ipv6_loopback()) {
    GTEST_SKIP() << "this machine has no ::1";
  }
  TcpOptions options;
  options.peer_init_url = "tcp://[::1]:0";
  Node a(4, options);
  Node b(4, options);
  EXPECT_TRUE(b.channel->peer_init_url().starts_with("tcp://[::1]:")) << b.channel->peer_init_url();
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  EXPECT_NE(a.channel->peer_info("b")->path.find("[::1]:"), std::string::npos) << a.channel->peer_info("b")->path;
}

TEST(ConnectFaults, Line09_AWildcardServesPeersOfEitherFamily) {
  TcpOptions options;
  options.peer_init_url = "tcp://*:0";
  Node b(4, options);
  const auto port = std::to_string(parse_url(b.channel->peer_init_url()).port);
  for (const std::string host : {"127.0.0.1", "[::1]"}) {
    if (host == "[::1]" && !has_ipv6_loopback()) {
      continue;
    }
    Node a(4, {}, false);
    a.channel->lazy_init_peer_connection("a " + host, "b", "tcp://" + host + ":" + port);
    EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
    EXPECT_NE(b.channel->peer_info("a " + host)->path.find(host + ":"), std::string::npos)
        << b.channel->peer_info("a " + host)->path;
  }
}

TEST(ConnectFaults, SocketsDontDelayAndHaveTheCongestionControlAskedFor) {
  TcpOptions options;
  options.congestion_control = "reno";  // always there (tcp(7))
  Node b(4, options);
  Node a(4, options, false);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  std::size_t sockets = 0;
  for (int descriptor = 3; descriptor < 1024; ++descriptor) {
    std::array<char, 16> name{};
    socklen_t size = name.size();
    if (::getsockopt(descriptor, IPPROTO_TCP, TCP_CONGESTION, name.data(), &size) == 0 && name.data() == "reno"s) {
      ++sockets;
      int no_delay = 0;
      size = sizeof(no_delay);
      EXPECT_EQ(::getsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &no_delay, &size), 0);
      EXPECT_NE(no_delay, 0);
    }
  }
  EXPECT_EQ(sockets, 2U) << "both ends of the data connection";

  options.congestion_control = "nonesuch";
  try {
    const Node c(4, options);
    ADD_FAILURE() << "there is no such congestion control";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
    EXPECT_NE(std::string(error.what()).find("'nonesuch'"), std::string::npos) << error.what();
  }
}

TEST(ConnectFaults, WithinAHostTheCongestionControlIsReno) {
  const auto path_of = [](const TcpOptions& options) {
    Node b(4, options);
    Node a(4, options, false);
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
    EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
    return a.channel->peer_info("b")->path;
  };
  std::ifstream setting("/proc/sys/net/ipv4/tcp_congestion_control");
  std::string systems_choice;
  ASSERT_TRUE(setting >> systems_choice);

  EXPECT_TRUE(path_of({}).ends_with(", 1 lane, reno")) << path_of({});
  TcpOptions as_everywhere;
  as_everywhere.same_host_congestion_control.clear();
  EXPECT_TRUE(path_of(as_everywhere).ends_with(", " + systems_choice)) << path_of(as_everywhere);
  TcpOptions one_for_all;
  one_for_all.congestion_control = systems_choice;
  EXPECT_TRUE(path_of(one_for_all).ends_with(", " + systems_choice)) << path_of(one_for_all);
  TcpOptions unknown;
  unknown.same_host_congestion_control = "nonesuch";
  EXPECT_THROW(Node(4, unknown), TransferError);
}

TEST(ConnectFaults, Line09_DataMayComeInElsewhere) {
  TcpOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.data_host = "127.0.0.2";
  Node b(4, options);
  Node a(4, {}, false);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  EXPECT_NE(a.channel->peer_info("b")->path.find("127.0.0.2:"), std::string::npos) << a.channel->peer_info("b")->path;
}

TEST(ConnectFaults, Line09_BoundAndAdvertisedAddressesCanDiffer) {
  Relay data;
  Relay handshakes;
  TcpOptions options;
  options.peer_init_url = "tcp://*:0";
  options.advertised_init_url = "tcp://" + handshakes.address();
  options.advertised_data_address = data.address();
  Node b(4, options);
  data.set_target(b.channel->data_port());
  EXPECT_EQ(b.channel->peer_init_url(), "tcp://" + handshakes.address());
  Node d(4);
  b.channel->lazy_init_peer_connection("b", "d", d.channel->peer_init_url());
  EXPECT_EQ(d.channel->peer_info("b")->init_url, "tcp://" + handshakes.address());
  // The port that was bound can be had by advertising port 0.
  TcpOptions by_name;
  by_name.peer_init_url = "tcp://127.0.0.1:0";
  by_name.advertised_init_url = "localhost:0";
  Node c(4, by_name);
  EXPECT_EQ(parse_url(c.channel->peer_init_url()).host, "localhost");
  Node a(4, {}, false);
  a.channel->lazy_init_peer_connection("a", "c", c.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "c", .remote_indexes = indexes(4)}), 4U);
}

}  // namespace
}  // namespace kvferry::tcp::testing
