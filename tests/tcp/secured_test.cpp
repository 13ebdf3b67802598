// SPDX-License-Identifier: Apache-2.0
// Channels with keys: who has the right one gets through, and nobody else gets anything.
#include <gtest/gtest.h>

#include <asio/connect.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/lasting_port.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t pages = 4;

/// A side message that says its name, which a capture shows where nothing is encrypted.
struct Whisper {
  std::string words;

  static constexpr std::string_view side_message_type = "Whisper";
  static constexpr auto side_message_fields() { return std::tuple(side_message_field("words", &Whisper::words)); }
};

TcpOptions with(std::shared_ptr<const Keyring> keyring) {
  TcpOptions options;
  options.keyring = std::move(keyring);
  options.handshake_timeout = long_enough;
  return options;
}

class Secured : public ::testing::Test {
 protected:
  [[nodiscard]] std::shared_ptr<Keyring> ring_of(const KeyPair& own, std::vector<PeerKey> peers) {
    return std::make_shared<Keyring>(own, std::move(peers));
  }

  /// How a connect under these names ends.
  static std::error_code connect(Node& from, Node& to, std::string_view local_id, std::string_view peer_id,
                                 std::string* diagnostic = nullptr,
                                 std::optional<milliseconds> timeout = std::nullopt) {
    std::error_code ec;
    (void)from.channel->lazy_init_peer_connection(local_id, peer_id, to.channel->peer_init_url(), std::nullopt,
                                                  {timeout, diagnostic}, ec);
    return ec;
  }

  static void expect_pages_move(Node& from, Node& to, std::string_view from_id, std::string_view to_id) {
    from.fill(3);
    const auto all = indexes(pages);
    EXPECT_EQ(from.channel->batched_write(from.pages(pages), {.peer_id = to_id, .remote_indexes = all}), pages);
    EXPECT_EQ(from.memory, to.memory);
    to.fill(4);
    EXPECT_EQ(to.channel->batched_write(to.pages(pages), {.peer_id = from_id, .remote_indexes = all}), pages);
    EXPECT_EQ(from.memory, to.memory);
  }

  const KeyPair a_key_ = make_key_pair();
  const KeyPair b_key_ = make_key_pair();
  const KeyPair stranger_key_ = make_key_pair();
  const std::shared_ptr<Keyring> a_ring_ = ring_of(a_key_, {{"b", b_key_.public_key}});
  const std::shared_ptr<Keyring> b_ring_ = ring_of(b_key_, {{"a", a_key_.public_key}});
  Node b_{pages, with(b_ring_)};
};

TEST_F(Secured, PeersWithTheRightKeysDoEverythingAsBefore) {
  Node a(pages, with(a_ring_));
  ASSERT_FALSE(connect(a, b_, "a", "b"));
  expect_pages_move(a, b_, "a", "b");
  // A side message without a peer's id goes to whoever has one of the keys.
  const auto answer = a.channel->send_init_side_msg(b_.channel->peer_init_url(), encode_side_message(P2PInitSideMsg{}));
  EXPECT_TRUE(answer.is<P2PInitSideRetMsg>());
  // The other side dials as well.
  a.channel->disconnect("b");
  b_.channel->disconnect("a");
  ASSERT_FALSE(connect(b_, a, "b", "a"));
  expect_pages_move(b_, a, "b", "a");
}

TEST_F(Secured, WhoseKeyIsUnknownLearnsNothing) {
  Node stranger(pages, with(ring_of(stranger_key_, {{"b", b_key_.public_key}})), false);
  std::string diagnostic;
  EXPECT_EQ(connect(stranger, b_, "a", "b", &diagnostic), errc::authentication_failed) << diagnostic;
  EXPECT_NE(diagnostic.find(stranger_key_.public_key), std::string::npos) << diagnostic;
  std::error_code ec;
  (void)stranger.channel->send_init_side_msg(b_.channel->peer_init_url(), encode_side_message(P2PInitSideMsg{}), {},
                                             ec);
  EXPECT_EQ(ec, errc::authentication_failed);
  const auto stats = b_.channel->stats();
  EXPECT_EQ(stats.handshakes.accepted, 0U);
  EXPECT_TRUE(stats.handshakes.refused.empty()) << "it never got as far";
  ASSERT_EQ(stats.refused_strangers.size(), 1U);
  EXPECT_EQ(stats.refused_strangers[0].cause, errc::authentication_failed);
}

TEST_F(Secured, WhoAnswersWithAnotherKeyIsNotBelieved) {
  Node impostor(pages, with(ring_of(stranger_key_, {{"a", a_key_.public_key}})));
  Node a(pages, with(a_ring_), false);
  std::string diagnostic;
  EXPECT_EQ(connect(a, impostor, "a", "b", &diagnostic, long_enough), errc::authentication_failed) << diagnostic;
  EXPECT_NE(diagnostic.find("'b'"), std::string::npos) << diagnostic;
  EXPECT_EQ(impostor.channel->stats().handshakes.accepted, 0U);
  EXPECT_EQ(connect(a, impostor, "a", "c", &diagnostic), errc::authentication_failed);
  EXPECT_NE(diagnostic.find("no key of peer 'c'"), std::string::npos) << diagnostic;
}

TEST_F(Secured, ATrustedKeyIsGoodForItsOwnIdAlone) {
  const KeyPair c_key = make_key_pair();
  b_ring_->replace_peers({{"a", a_key_.public_key}, {"c", c_key.public_key}});
  Node a(pages, with(a_ring_), false);
  ASSERT_FALSE(connect(a, b_, "a", "b"));
  Node c(pages, with(ring_of(c_key, {{"b", b_key_.public_key}})), false);
  std::string diagnostic;
  EXPECT_EQ(connect(c, b_, "a", "b", &diagnostic), errc::authentication_failed) << diagnostic;
  EXPECT_NE(diagnostic.find("'a'"), std::string::npos) << diagnostic;
  EXPECT_NE(diagnostic.find(c_key.public_key), std::string::npos) << diagnostic;
  expect_pages_move(a, b_, "a", "b");
  EXPECT_EQ(b_.channel->stats().peer_replacements, 0U);
  EXPECT_FALSE(connect(c, b_, "c", "b"));
  expect_pages_move(c, b_, "c", "b");
}

TEST_F(Secured, WhoHangsUpForAWhileIsNotTakenForAnImpostor) {
  asio::io_context context;
  // Of nobody else, not even for a connection of the dialing side's, when the one has closed it and the other doesn't listen yet.
  const std::string url = kvferry_test::lasting_url();
  asio::ip::tcp::acceptor busy(context,
                               {asio::ip::make_address(kvferry::testing::own_loopback()), parse_url(url).port});
  Node a(pages, with(a_ring_), false);
  std::error_code ec;
  std::string diagnostic;
  std::jthread connecting([&] {
    (void)a.channel->lazy_init_peer_connection("a", "b", url, std::nullopt, {milliseconds(60'000), &diagnostic}, ec);
  });
  for (int turned_away = 0; turned_away < 6; ++turned_away) {
    busy.accept().close();
  }
  busy.close();
  TcpOptions options = with(b_ring_);
  options.peer_init_url = url;
  Node b(pages, options);
  connecting.join();
  ASSERT_FALSE(ec) << ec.message() << ": " << diagnostic;
  expect_pages_move(a, b, "a", "b");
}

TEST_F(Secured, ANoAtOneAddressIsNotTheLastWord) {
  // Of a server's keys the first is an old one of a peer that is somebody else's now.
  const KeyPair other_key = make_key_pair();
  const auto ring = ring_of(a_key_, {{"b", other_key.public_key}, {"b", b_key_.public_key}});
  Node a(pages, with(ring), false);
  ASSERT_FALSE(connect(a, b_, "a", "b"));
  expect_pages_move(a, b_, "a", "b");
}

TEST_F(Secured, PlainAndSecuredDoNotMeet) {
  Node plain(pages);
  std::string diagnostic;
  EXPECT_EQ(connect(plain, b_, "a", "b", &diagnostic), errc::authentication_failed);
  EXPECT_NE(diagnostic.find("this channel has no keyring"), std::string::npos) << diagnostic;
  Node a(pages, with(a_ring_), false);
  EXPECT_EQ(connect(a, plain, "a", "b", &diagnostic), errc::authentication_failed);
  EXPECT_NE(diagnostic.find("doesn't secure its handshakes"), std::string::npos) << diagnostic;
  EXPECT_EQ(plain.channel->stats().handshakes.accepted, 0U);
  EXPECT_EQ(b_.channel->stats().handshakes.accepted, 0U);
}

TEST_F(Secured, KeysAreExchangedWithoutARestart) {
  Node a(pages, with(a_ring_), false);
  const KeyPair b_next = make_key_pair();
  a_ring_->replace_peers({{"b", b_key_.public_key}, {"b", b_next.public_key}});
  ASSERT_FALSE(connect(a, b_, "a", "b"));
  b_ring_->replace_own(b_next);
  expect_pages_move(a, b_, "a", "b");  // over the connection that there is
  a.channel->disconnect("b");
  ASSERT_FALSE(connect(a, b_, "a", "b")) << "by the second of the two";
  expect_pages_move(a, b_, "a", "b");
  a.channel->disconnect("b");
  a_ring_->replace_peers({{"b", b_key_.public_key}});
  EXPECT_EQ(connect(a, b_, "a", "b", nullptr, long_enough), errc::authentication_failed)
      << "the old one is no good any more";

  // The client's own key likewise.
  const KeyPair a_next = make_key_pair();
  a_ring_->replace_peers({{"b", b_next.public_key}});
  b_ring_->replace_peers({{"a", a_key_.public_key}, {"a", a_next.public_key}});
  a_ring_->replace_own(a_next);
  ASSERT_FALSE(connect(a, b_, "a", "b"));
  a.channel->disconnect("b");
  b_ring_->replace_peers({{"a", a_key_.public_key}});
  EXPECT_EQ(connect(a, b_, "a", "b"), errc::authentication_failed);
}

TEST_F(Secured, AGroupMayShareOneKeyUnderAnyId) {
  const auto group = ring_of(a_key_, {{std::string(PeerKey::any_id), a_key_.public_key}});
  Node one(pages, with(group));
  Node other(pages, with(group));
  ASSERT_FALSE(connect(one, other, "one", "other"));
  expect_pages_move(one, other, "one", "other");
}

TEST_F(Secured, AContextOfTheUsersAndKeysExcludeEachOther) {
  TcpOptions options = with(a_ring_);
  int context = 0;  // is not looked at
  options.zmq_context = &context;
  try {
    const Node made(pages, std::move(options));
    FAIL() << "it was made";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::invalid_argument) << error.what();
  }
}

TEST_F(Secured, ACaptureOfHandshakesShowsNothing) {
  const auto a_ring = ring_of(a_key_, {{"decoding-server", b_key_.public_key}});
  const auto b_ring = ring_of(b_key_, {{"prefilling-server", a_key_.public_key}});
  for (const bool secured : {false, true}) {
    Relay relay;
    relay.record();
    Node a(pages, secured ? with(a_ring) : TcpOptions(), false);
    Node b(pages, secured ? with(b_ring) : TcpOptions());
    relay.set_target(parse_url(b.channel->peer_init_url()).port);
    std::error_code unanswered;
    a.channel->lazy_init_peer_connection("prefilling-server", "decoding-server", "tcp://" + relay.address(),
                                         encode_side_message(Whisper{"of pages"}), {}, unanswered);
    expect_pages_move(a, b, "prefilling-server", "decoding-server");
    const std::string all = relay.recorded(true) + relay.recorded(false);
    ASSERT_GT(all.size(), 500U);
    for (const std::string_view word : {"prefilling-server", "decoding-server", "KvferryInit", "secret", "of pages"}) {
      EXPECT_EQ(all.find(word) == std::string::npos, secured) << word;
    }
  }
}

TEST_F(Secured, AReplayedHandshakeComesToNothing) {
  Relay relay;
  relay.record();
  relay.set_target(parse_url(b_.channel->peer_init_url()).port);
  Node a(pages, with(a_ring_), false);
  a.channel->lazy_init_peer_connection("a", "b", "tcp://" + relay.address());
  const auto accepted = b_.channel->stats().handshakes.accepted;
  const std::string said = relay.recorded(true);
  asio::io_context context;
  asio::ip::tcp::socket socket(context);
  socket.connect({asio::ip::address_v4::loopback(), parse_url(b_.channel->peer_init_url()).port});
  std::error_code ec;
  asio::write(socket, asio::buffer(said), ec);
  std::string heard;
  std::array<char, 4096> buffer{};
  while (!ec) {
    heard.append(buffer.data(), socket.read_some(asio::buffer(buffer), ec));
  }
  // The greeting and, at most, a welcome that only the owner of the recorded connection's short-lived key can read.
  EXPECT_LE(heard.size(), 64U + 170U);
  EXPECT_EQ(b_.channel->stats().handshakes.accepted, accepted);
  EXPECT_EQ(b_.channel->stats().peers.size(), 1U);
  expect_pages_move(a, b_, "a", "b");
}

}  // namespace
}  // namespace kvferry::tcp::testing
