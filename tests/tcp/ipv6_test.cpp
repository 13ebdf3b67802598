// SPDX-License-Identifier: Apache-2.0
// Two hosts - network namespaces - that are joined by a cable, and what they tell each other of where they are.
#include <gtest/gtest.h>

#include <zmq.hpp>

#include <memory>
#include <optional>
#include <string>
#include <system_error>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/network_namespace.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using test::NetworkNamespace;

/// A channel that lives in a namespace.
class HostInNetwork {
 public:
  explicit HostInNetwork(NetworkNamespace& network) : network_(network) {}
  ~HostInNetwork() { stop(); }

  void start(const std::string& url) {
    TcpOptions options;
    options.zmq_context = context_.handle();
    options.peer_init_url = url;
    network_.run([&] { node_.emplace(4, options, !url.empty()); });
  }
  void stop() {
    network_.run([&] { node_.reset(); });
  }
  /// The outcome, for people to read; "ok" if it went well.
  std::string connect(const std::string& url) {
    std::error_code ec;
    std::string why;
    network_.run([&] {
      node_->channel->lazy_init_peer_connection("dialer", "server", url, {}, {.timeout = long_enough, .diagnostic = &why}, ec);
    });
    return ec ? ec.message() + ": " + why : "ok";
  }
  std::error_code write(const std::string& peer) {
    std::error_code ec;
    const auto to = indexes(1);
    node_->channel->batched_write(node_->pages(1), {.peer_id = peer, .remote_indexes = to, .timeout = long_enough}, ec);
    return ec;
  }
  [[nodiscard]] std::uint16_t port() const { return parse_url(node_->channel->peer_init_url()).port; }
  TcpTransferChannel& channel() { return *node_->channel; }

 private:
  NetworkNamespace& network_;
  zmq::context_t context_;
  std::optional<Node> node_;
};

class TwoHosts : public ::testing::Test {
 protected:
  void SetUp() override {
    if (const auto why = test::why_no_network_namespace(); !why.empty()) {
      GTEST_SKIP() << why;
    }
    networks_.emplace();
    NetworkNamespace::connect(networks_->first, "kva", networks_->second, "kvb");
    for (const auto& [network, device, number] :
         {std::tuple(&networks_->first, "kva", "1"), std::tuple(&networks_->second, "kvb", "2")}) {
      const std::string add = "ip addr add ";
      network->command(add + "10.77.0." + number + "/24 dev " + device);
      network->command(add + "fd77::" + number + "/64 nodad dev " + device);
      network->command(add + "fe80::" + number + "/64 nodad dev " + device);
    }
    dialer.emplace(networks_->first);
    server.emplace(networks_->second);
  }
  NetworkNamespace& server_network() { return networks_->second; }

  /// Where the server is, under one of its addresses.
  std::string server_at(const std::string& host) { return HostPort{host, server->port()}.to_url(); }

 private:
  struct Networks {
    NetworkNamespace first;
    NetworkNamespace second;
  };
  std::optional<Networks> networks_;

 protected:
  std::optional<HostInNetwork> dialer;
  std::optional<HostInNetwork> server;
};

TEST_F(TwoHosts, AWildcardTakesDataOfBothFamiliesWhateverTheSystemsDefault) {
  server_network().command("echo 1 > /proc/sys/net/ipv6/bindv6only");
  for (const auto* wildcard : {"tcp://[::]:0", "tcp://*:0", "tcp://[::0]:0"}) {
    server->start(wildcard);
    for (const auto* host : {"10.77.0.2", "fd77::2", "fe80::2%kva", "::ffff:10.77.0.2"}) {
      dialer->start("");
      EXPECT_EQ(dialer->connect(server_at(host)), "ok") << wildcard << " at " << host;
      EXPECT_FALSE(dialer->write("server")) << wildcard << " at " << host;
    }
  }
}

TEST_F(TwoHosts, AWildcardIsNotToldInAnySpelling) {
  server->start("tcp://10.77.0.2:0");
  for (const auto* wildcard : {"tcp://0:0", "tcp://[::0]:0", "tcp://[::ffff:0.0.0.0]:0", "tcp://0.0.0.0:0"}) {
    dialer->start(wildcard);
    ASSERT_EQ(dialer->connect(server_at("10.77.0.2")), "ok");
    EXPECT_EQ(server->channel().peer_info("dialer")->init_url, "") << wildcard;
  }
}

TEST_F(TwoHosts, AnAddressWithAZoneIsFoundAgainInTheZoneWhereItWasSeen) {
  server->start("tcp://[fe80::2%kvb]:0");
  dialer->start("tcp://[fe80::1%kva]:0");
  ASSERT_EQ(dialer->connect(server_at("fe80::2%kva")), "ok");
  ASSERT_FALSE(server->write("dialer"));
  const auto told = server->channel().peer_info("dialer")->init_url;
  EXPECT_EQ(told, "tcp://[fe80::1%kvb]:" + std::to_string(dialer->port())) << "the dialer's zone is kva";

  const auto port = dialer->port();
  dialer->stop();
  // A write that begins before the server has noticed fails as the connection does, and the one after it is told of the restart.
  while (server->channel().wait_peer_event(long_enough).kind != PeerEventKind::gone) {
  }
  dialer->start("tcp://[fe80::1%kva]:" + std::to_string(port));
  EXPECT_EQ(server->write("dialer"), errc::peer_restarted);
  EXPECT_FALSE(server->write("dialer"));
}

TEST_F(TwoHosts, AServerThatWasNotToldWhereAPeerIsSaysSoAtOnce) {
  server->start("tcp://*:0");
  dialer->start("tcp://*:0");
  ASSERT_EQ(dialer->connect(server_at("fd77::2")), "ok");
  ASSERT_FALSE(server->write("dialer"));
  dialer->stop();
  std::error_code ec;
  while (!ec) {
    ec = server->write("dialer");  // until it has noticed
  }
  EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  EXPECT_NE(ec, condition::timed_out) << ec.message();
}

}  // namespace
}  // namespace kvferry::tcp::testing
