// SPDX-License-Identifier: Apache-2.0
// The ports that a channel takes for itself don't get in each other's way.
#include <gtest/gtest.h>

#include <zmq.hpp>

#include <cstdint>
#include <string>

#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/network_namespace.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// The system gives any of a few ports to who asks for any, the one of the handshakes among them.
TEST(OwnPorts, DataConnectionsLeaveTheHandshakesTheirPort) {
  if (const auto why = test::why_no_network_namespace(); !why.empty()) {
    GTEST_SKIP() << why;
  }
  test::NetworkNamespace network;
  network.command("echo '50000 50003' > /proc/sys/net/ipv4/ip_local_port_range");
  for (int round = 0; round < 8; ++round) {
    for (std::uint16_t port = 50000; port <= 50003; ++port) {
      network.run([&] {
        zmq::context_t context;
        TcpOptions options;
        options.zmq_context = context.handle();
        options.peer_init_url = "tcp://127.0.0.1:" + std::to_string(port);
        const Node node(1, options);
        EXPECT_EQ(parse_url(node.channel->peer_init_url()).port, port);
        EXPECT_NE(node.channel->data_port(), port);
      });
    }
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
