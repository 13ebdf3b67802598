// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/allowed_hosts.hpp>

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <system_error>
#include <tuple>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/network_namespace.hpp"
#include "common/scripted_names.hpp"
#include "common/unanswering_port.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using test::ScriptedNames;
using test::UnansweringPort;

TEST(AllowedHosts, AreTheOneThatAnsweredUnlessMoreIsSaid) {
  const AllowedHosts none;
  EXPECT_TRUE(none.allow("192.0.2.1", "192.0.2.1"));
  EXPECT_TRUE(none.allow("::ffff:192.0.2.1", "192.0.2.1"));
  EXPECT_TRUE(none.allow("fe80::1", "fe80::1%lo"));
  EXPECT_FALSE(none.allow("192.0.2.2", "192.0.2.1"));
  EXPECT_FALSE(none.allow("host.example", "192.0.2.1"));
  EXPECT_TRUE(none.allow("127.0.0.2", "127.0.0.1")) << "the same host: this one";
  EXPECT_FALSE(none.allow("127.0.0.1", "192.0.2.1")) << "not the peer's host, but this one";
}

TEST(AllowedHosts, AreAddressesRangesAndNames) {
  const AllowedHosts some({"198.51.100.0/24", "2001:db8::/33", "203.0.113.7", "Data.Example"});
  for (const auto* good : {"198.51.100.255", "::ffff:198.51.100.1", "2001:db8:7fff::1", "203.0.113.7", "data.example"}) {
    EXPECT_TRUE(some.allow(good, "192.0.2.1")) << good;
  }
  for (const auto* bad : {"198.51.101.0", "2001:db8:8000::1", "203.0.113.8", "x.data.example", "0.0.0.0", "::"}) {
    EXPECT_FALSE(some.allow(bad, "192.0.2.1")) << bad;
  }
  EXPECT_TRUE(AllowedHosts({"0.0.0.0/0"}).allow("198.51.100.1", "192.0.2.1"));
  EXPECT_FALSE(AllowedHosts({"0.0.0.0/0"}).allow("2001:db8::1", "192.0.2.1"));
  EXPECT_TRUE(AllowedHosts({"*"}).allow("anything.example", "192.0.2.1"));
}

TEST(AllowedHosts, OfAPeerOnThisHostAreAllItsAddresses) {
  if (const auto why = test::why_no_network_namespace(); !why.empty()) {
    GTEST_SKIP() << why;
  }
  test::NetworkNamespace network;
  network.command("ip address add 198.51.100.7/32 dev lo && ip address add 2001:db8::7/128 dev lo nodad");
  network.run([] {
    const AllowedHosts none;
    for (const auto* own : {"198.51.100.7", "2001:db8::7", "127.0.0.9"}) {
      for (const auto* answered : {"127.0.0.1", "::1", "198.51.100.7", "2001:db8::7"}) {
        EXPECT_TRUE(none.allow(own, answered)) << own << ", " << answered;
      }
      EXPECT_FALSE(none.allow(own, "192.0.2.1")) << own;
    }
    for (const auto* other : {"198.51.100.8", "2001:db8::8"}) {
      EXPECT_FALSE(none.allow(other, "127.0.0.1")) << other;
      EXPECT_FALSE(none.allow(other, "198.51.100.7")) << other;
    }
  });
}

TEST(AllowedHosts, SaysWhatIsWrongWithAnEntry) {
  for (const auto* bad : {"", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/x", "fd00::/129", "name/8", "a b", "[::1]"}) {
    try {
      TcpOptions options;
      options.allowed_hosts = {bad};
      const Node node(4, options);
      ADD_FAILURE() << "taken: " << bad;
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::invalid_url) << bad;
      EXPECT_NE(std::string(error.what()).find("allowed host"), std::string::npos) << error.what();
    }
  }
}

/// Connects to a server whose data connections are to be made at `address`. @return the error, and a sentence.
std::pair<std::error_code, std::string> connect(const std::string& address, TcpOptions options = {}) {
  TcpOptions elsewhere;
  elsewhere.advertised_data_address = address;
  const Node server(4, elsewhere);
  Node node(4, std::move(options), false);
  std::error_code ec;
  std::string why;
  node.channel->lazy_init_peer_connection("node", "server", server.channel->peer_init_url(), {},
                                          {.timeout = long_enough, .diagnostic = &why}, ec);
  return {ec, why};
}

TEST(AllowedHosts, APeerCantMakeAChannelConnectAnywhere) {
  for (const std::string address : {"192.0.2.1:80", "[2001:db8::1]:80"}) {
    const auto [ec, why] = connect(address);
    EXPECT_EQ(ec, errc::handshake_failed) << why;
    EXPECT_NE(why.find(parse_url(address).host), std::string::npos) << why;
    EXPECT_NE(why.find("allowed_hosts"), std::string::npos) << why;
  }
}

TEST(AllowedHosts, APeerCantMakeAChannelLookUpNames) {
  ScriptedNames names;
  names.hold("evil.test");
  const auto [ec, why] = connect("evil.test:80");
  EXPECT_EQ(ec, errc::handshake_failed) << why;
  EXPECT_EQ(names.asked("evil.test"), 0U);
}

TEST(AllowedHosts, ANameThatIsAllowedIsLookedUpAndItsAddressesAreRaced) {
  std::optional<UnansweringPort> dead;
  std::optional<Node> server;
  for (int tries = 0; !server; ++tries) {
    dead.emplace("127.0.0.2");
    TcpOptions options;
    options.data_host = "127.0.0.3";
    options.data_port = dead->port();
    options.advertised_data_address = "data.test:" + std::to_string(dead->port());
    try {
      server.emplace(4, options);
    } catch (const TransferError& error) {
      ASSERT_TRUE(error.code() == std::errc::address_in_use && tries < 20)
          << error.what();  // another process has it there
    }
  }
  ScriptedNames names;
  names.answer("data.test", {{"127.0.0.2", "127.0.0.3"}});
  TcpOptions allowing;
  allowing.allowed_hosts = {"data.test"};
  allowing.lanes_per_peer = 2;
  Node node(4, allowing, false);
  std::error_code ec;
  std::string why;
  node.channel->lazy_init_peer_connection("node", "server", server->channel->peer_init_url(), {},
                                          {.timeout = long_enough, .diagnostic = &why}, ec);
  ASSERT_FALSE(ec) << ec.message() << ": " << why;
  const auto path = node.channel->peer_info("server")->path;
  EXPECT_NE(path.find("-> 127.0.0.3:"), std::string::npos) << path;
}

TEST(AllowedHosts, ANameThatIsAllowedAndHasNoAddressIsAFailedPeer) {
  ScriptedNames names;
  names.answer("empty.test", {{}});
  TcpOptions allowing;
  allowing.allowed_hosts = {"empty.test"};
  const auto [ec, why] = connect("empty.test:80", allowing);
  EXPECT_EQ(ec, condition::peer_failed) << ec.message() << ": " << why;
}

}  // namespace
}  // namespace kvferry::tcp::testing
