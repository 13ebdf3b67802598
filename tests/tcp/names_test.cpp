// SPDX-License-Identifier: Apache-2.0
// Peers that are known by name.
#include <gtest/gtest.h>

#include <netdb.h>
#include <asio/error.hpp>

#include <chrono>
#include <exception>
#include <functional>
#include <future>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/scripted_names.hpp"
#include "common/unanswering_port.hpp"
#include <kvferry/detail/name_lookups.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using test::ScriptedNames;
using test::UnansweringPort;

TcpOptions listening_at(const std::string& host, std::uint16_t port = 0, std::uint16_t data_port = 0) {
  TcpOptions options;
  options.peer_init_url = "tcp://" + host + ":" + std::to_string(port);
  options.data_port = data_port;
  return options;
}

std::uint16_t init_port(const Node& node) { return parse_url(node.channel->peer_init_url()).port; }

/// Makes what takes a port at one address that is free at another one: `make` is called until it is free there, too.
void find_free_port(const std::function<void()>& make) {
  for (int tries = 0;; ++tries) {
    try {
      make();
      return;
    } catch (const std::exception&) {
      if (tries == 20) {
        throw;
      }
    }
  }
}

/// Two servers that have the same ports at two addresses.
struct TwoPods {
  explicit TwoPods(const std::string& lookup_url_of_first = {}, const std::string& lookup_url_of_second = {}) {
    find_free_port([&] {
      TcpOptions one = listening_at("127.0.0.2");
      one.peer_lookup_url = lookup_url_of_first;
      first.emplace(4, one);
      TcpOptions other = listening_at("127.0.0.3", init_port(*first), first->channel->data_port());
      other.peer_lookup_url = lookup_url_of_second;
      second.emplace(4, other);
    });
  }

  std::optional<Node> first;
  std::optional<Node> second;
};

TEST(PeerNames, DataGoesToThePodThatAnsweredTheHandshake) {
  // One name, two servers, in another order at each lookup; the servers have the same ports, as pods do.
  const TwoPods pods;
  const Node& first = *pods.first;
  const Node& second = *pods.second;
  ScriptedNames names;
  std::vector<std::vector<std::string>> turns;
  for (int i = 0; i < 5; ++i) {
    turns.push_back({"127.0.0.2", "127.0.0.3"});
    turns.push_back({"127.0.0.3", "127.0.0.2"});
  }
  names.answer("pods.test", turns);
  for (std::size_t i = 0; i < turns.size(); ++i) {
    TcpOptions options;
    options.lanes_per_peer = 2;
    Node node(4, options, false);
    std::error_code ec;
    std::string why;
    const auto accepted = [](const Node& server) { return server.channel->stats().handshakes.accepted; };
    const auto by_first = accepted(first);
    const auto by_second = accepted(second);
    const auto begun = std::chrono::steady_clock::now();
    node.channel->lazy_init_peer_connection("node" + std::to_string(i), "pod",
                                            "tcp://pods.test:" + std::to_string(init_port(first)), {},
                                            {.diagnostic = &why}, ec);
    ASSERT_FALSE(ec) << ec.message() << ": " << why;
    EXPECT_EQ(names.asked("pods.test"), i + 1) << "one lookup for handshake and data";
    EXPECT_EQ(accepted(first) + accepted(second), by_first + by_second + 1);
    const std::string answered = accepted(first) > by_first ? "127.0.0.2" : "127.0.0.3";
    const auto path = node.channel->peer_info("pod")->path;
    EXPECT_NE(path.find("-> " + answered + ":"), std::string::npos) << path;
    // The second one has its turn after a quarter of a second.
    EXPECT_TRUE(answered == turns[i].front() ||
                std::chrono::steady_clock::now() - begun > std::chrono::milliseconds(250));
    EXPECT_NE(path.find(", 1 lane"), std::string::npos) << path << ": the servers want one";
    EXPECT_EQ(node.channel->batched_write(node.pages(4), {.peer_id = "pod", .remote_indexes = indexes(4)}), 4U);
  }
}

TEST(PeerNames, BothPortsOfAChannelAreAtTheSameOfANamesAddressesWhichIsThisHosts) {
  // In another order at each lookup, and one of them another host's.
  ScriptedNames names;
  std::vector<std::vector<std::string>> turns;
  for (int i = 0; i < 6; ++i) {
    turns.push_back({"127.0.0.3", "192.0.2.1", "127.0.0.2"});
    turns.push_back({"127.0.0.2", "127.0.0.3", "192.0.2.1"});
    turns.push_back({"192.0.2.1", "127.0.0.2", "127.0.0.3"});
  }
  names.answer("service.test", turns);
  for (int round = 0; round < 3; ++round) {
    Node server(4, listening_at("service.test"));
    Node node(4, {}, false);
    std::error_code ec;
    std::string why;
    node.channel->lazy_init_peer_connection("node", "server", server.channel->peer_init_url(), {}, {.diagnostic = &why},
                                            ec);
    ASSERT_FALSE(ec) << ec.message() << ": " << why;
    EXPECT_EQ(node.channel->batched_write(node.pages(4), {.peer_id = "server", .remote_indexes = indexes(4)}), 4U);
  }
}

TEST(PeerNames, AConstructorWaitsForTheNameToListenAtNoLongerThanAHandshake) {
  ScriptedNames names;
  names.hold("slow.test");
  for (const bool data : {false, true}) {
    TcpOptions options = listening_at(data ? "127.0.0.1" : "slow.test");
    options.data_host = data ? "slow.test" : "127.0.0.1";
    options.handshake_timeout = std::chrono::milliseconds(50);
    try {
      const Node node(1, std::move(options));
      ADD_FAILURE() << "listens at a name that nobody has resolved";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::timed_out);
      EXPECT_NE(std::string(error.what()).find("'slow.test', was not resolved within 50 ms"), std::string::npos)
          << error.what();
    }
  }
  names.release("slow.test");
}

TEST(PeerNames, AConstructorNamesTheHostToListenAtThatHasNoAddress) {
  ScriptedNames names;
  names.fail("misspelt.test", EAI_NONAME);
  for (const bool data : {false, true}) {
    TcpOptions options = listening_at(data ? "127.0.0.1" : "misspelt.test");
    options.data_host = data ? "misspelt.test" : "127.0.0.1";
    try {
      const Node node(1, std::move(options));
      ADD_FAILURE() << "listens at a name that has no address";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), std::errc::address_not_available);
      const std::string what = error.what();
      EXPECT_NE(what.find("misspelt.test:0: the host has no address: Host not found"), std::string::npos) << what;
    }
  }
}

TEST(PeerNames, ASideMessageGoesToThePodThatTheConnectionGoesTo) {
  const TwoPods pods("one", "other");
  ScriptedNames names;
  names.answer("pods.test", {{"127.0.0.2"}, {"127.0.0.3"}});
  Node node(4, {}, false);
  const auto answer = node.channel->lazy_init_peer_connection(
      "node", "pod", "tcp://pods.test:" + std::to_string(init_port(*pods.first)),
      encode_side_message(P2PInitSideMsg{}));
  ASSERT_TRUE(answer);
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(*answer).peer_lookup_url, "one");
}

TEST(PeerNames, AnAddressThatDoesNotAnswerDoesNotUseUpTheDeadline) {
  std::optional<Node> server;
  std::optional<UnansweringPort> dead;
  find_free_port([&] {
    server.emplace(4, listening_at("127.0.0.3"));
    dead.emplace("127.0.0.2", init_port(*server));
  });
  ScriptedNames names;
  names.answer("half.test", {{"127.0.0.2", "127.0.0.3"}});
  Node node(4, {}, false);
  std::error_code ec;
  std::string why;
  node.channel->lazy_init_peer_connection("node", "server", "tcp://half.test:" + std::to_string(init_port(*server)), {},
                                          {.timeout = long_enough, .diagnostic = &why}, ec);
  EXPECT_FALSE(ec) << ec.message() << ": " << why;
}

TEST(PeerNames, ALookupHoldsUpNeitherOtherPeersNorTheChannelsEnd) {
  Node server(4);
  ScriptedNames names;
  names.answer("good.test", {{"127.0.0.1"}});
  std::optional<Node> node(std::in_place, 4, TcpOptions{}, false);
  std::vector<std::future<std::optional<SideMessage>>> held;
  for (int i = 0; i < 16; ++i) {
    const auto name = "held" + std::to_string(i) + ".test";
    names.hold(name);
    held.push_back(node->channel->async_lazy_init_peer_connection("node", name, "tcp://" + name + ":5000", {},
                                                                  {.timeout = long_enough}, asio::use_future));
    names.wait_until_asked(name);
  }
  std::error_code ec;
  std::string why;
  node->channel->lazy_init_peer_connection("node", "server", "tcp://good.test:" + std::to_string(init_port(server)), {},
                                           {.timeout = long_enough, .diagnostic = &why}, ec);
  EXPECT_FALSE(ec) << ec.message() << ": " << why;
  node->channel->close();
  for (auto& one : held) {
    try {
      one.get();
      ADD_FAILURE() << "connected";
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::closed);
    }
  }
  node.reset();
  for (int i = 0; i < 16; ++i) {
    names.release("held" + std::to_string(i) + ".test");
  }
  while (kit::NameLookups::join_left_behind() != 0) {
    std::this_thread::yield();
  }
}

TEST(PeerNames, ANameWithoutAnAddressIsNoPeer) {
  ScriptedNames names;
  names.answer("empty.test", {{}});
  Node node(4, {}, false);
  std::error_code ec;
  node.channel->lazy_init_peer_connection("node", "server", "tcp://empty.test:5000", {}, {.timeout = long_enough}, ec);
  EXPECT_EQ(ec, asio::error::host_not_found);
  EXPECT_EQ(ec, condition::peer_failed);
}

}  // namespace
}  // namespace kvferry::tcp::testing
