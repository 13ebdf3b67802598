// SPDX-License-Identifier: Apache-2.0
// Peers' identities: two channels of one name, and strangers who say that they are a peer.
#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "init_question.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

bool a_later_one_is_refused_while_the_earlier_one_lives() {
  Node server(4);
  Node first(4);
  Node second(4);
  EXPECT_FALSE(connect(first, "a", "b", server.channel->peer_init_url()));
  const auto incarnation = server.channel->peer_info("a").value_or(PeerInfo{}).incarnation;
  for (int round = 0; round < 5; ++round) {
    std::string diagnostic;
    if (!is_refused_for_one_that_lives(
            [&] { return connect(second, "a", "b", server.channel->peer_init_url(), &diagnostic); })) {
      return false;
    }
    EXPECT_NE(diagnostic.find("'a'"), std::string::npos) << diagnostic;
    EXPECT_NE(diagnostic.find(std::to_string(incarnation)), std::string::npos) << diagnostic;
    EXPECT_FALSE(write_one(first, "b"));
    EXPECT_FALSE(write_one(server, "a"));
  }
  EXPECT_EQ(server.channel->peer_info("a").value_or(PeerInfo{}).incarnation, incarnation);
  EXPECT_EQ(server.channel->stats().identity_conflicts, 5U);
  EXPECT_EQ(second.channel->stats().identity_conflicts, 5U);
  EXPECT_EQ(first.channel->stats().transfers[static_cast<std::size_t>(TransferKind::write)].failed(), 0U);
  first.channel.reset();
  EXPECT_FALSE(connect(second, "a", "b", server.channel->peer_init_url()));
  EXPECT_EQ(write_one(server, "a"), errc::peer_restarted);
  EXPECT_FALSE(write_one(server, "a"));
  return true;
}

TEST(SameIdTwice, TheLaterOneIsRefusedWhileTheEarlierOneLives) {
  show_in_the_end(a_later_one_is_refused_while_the_earlier_one_lives);
}

TEST(SameIdTwice, OneServerMayBeKnownByTwoNames) {
  Node server(4);
  Node client(4);
  ASSERT_FALSE(connect(client, "a", "b", server.channel->peer_init_url()));
  std::string diagnostic;
  EXPECT_FALSE(connect(client, "a", "second name of b", server.channel->peer_init_url(), &diagnostic)) << diagnostic;
  EXPECT_FALSE(write_one(client, "second name of b"));
  EXPECT_FALSE(write_one(server, "a"));
  EXPECT_EQ(server.channel->stats().identity_conflicts, 0U);
}

/// The url with another host in it.
std::string spelled(const std::string& url, const std::string& host) {
  return "tcp://" + host + ":" + std::to_string(parse_url(url).port);
}

TEST(SameIdTwice, AConnectedPeerIsNotToldASecondIdOfThisChannel) {
  Node server(4);
  Node client(4);
  const std::string url = server.channel->peer_init_url();
  ASSERT_FALSE(connect(client, "a", "b", url));
  std::string diagnostic;
  EXPECT_EQ(connect(client, "other a", "b", url, &diagnostic), std::errc::invalid_argument);
  EXPECT_NE(diagnostic.find("knows this channel as 'a', not 'other a'"), std::string::npos) << diagnostic;
  EXPECT_EQ(connect(client, "other a", "b", spelled(url, "localhost")), std::errc::invalid_argument);
  EXPECT_FALSE(connect(client, "a", "b", url));
  EXPECT_FALSE(write_one(client, "b"));
  EXPECT_FALSE(write_one(server, "a"));
  EXPECT_EQ(write_one(server, "other a"), errc::unknown_peer);
  client.channel->disconnect("b");
  EXPECT_FALSE(connect(client, "other a", "b", url, &diagnostic)) << diagnostic;
  EXPECT_FALSE(write_one(server, "other a"));
}

TEST(SameIdTwice, OfTwoIdsThatAreToldAtOnceOneIsRefused) {
  Node server(4);
  for (int round = 0; round < 20; ++round) {
    Node client(4);
    const std::string url = server.channel->peer_init_url();
    const std::string ids[]{"a" + std::to_string(round), "other a" + std::to_string(round)};
    std::error_code second;
    std::thread other([&] { second = connect(client, ids[1], "b", url); });
    const std::error_code first = connect(client, ids[0], "b", url);
    other.join();
    EXPECT_NE(!first, !second) << first.message() << ", " << second.message();
    EXPECT_EQ(first ? first : second, std::errc::invalid_argument);
    EXPECT_FALSE(write_one(server, first ? ids[1] : ids[0]));
    EXPECT_EQ(write_one(server, first ? ids[0] : ids[1]), errc::unknown_peer);
  }
}

TEST(SameIdTwice, ThePeerThatConnectedByItselfHasNamedThisChannel) {
  Node server(4);
  Node client(4);
  ASSERT_FALSE(connect(server, "b", "name of the server's", client.channel->peer_init_url()));
  EXPECT_FALSE(connect(client, "a", "b", server.channel->peer_init_url()));
  EXPECT_FALSE(write_one(client, "b"));
  EXPECT_FALSE(write_one(server, "name of the server's"));
}

bool one_server_may_be_known_by_two_spellings(bool server_dials) {
  Node server(4);
  Node client(4);
  const std::string url = server.channel->peer_init_url();
  EXPECT_FALSE(server_dials ? connect(server, "b", "a", client.channel->peer_init_url())
                            : connect(client, "a", "b", url));
  std::string diagnostic;
  const SecondToAnswer second;
  EXPECT_FALSE(connect(client, "a", "second name of b", spelled(url, "localhost"), &diagnostic)) << diagnostic;
  if (second.is_over() && server.channel->stats().peer_replacements != 0) {
    return false;
  }
  EXPECT_FALSE(write_one(client, "second name of b"));
  EXPECT_FALSE(write_one(server, "a"));
  EXPECT_EQ(client.channel->stats().identity_conflicts, 0U);
  EXPECT_EQ(server.channel->stats().peer_replacements, 0U);
  return true;
}

TEST(SameIdTwice, OneServerMayBeKnownByTwoNamesAtUrlsThatAreSpelledDifferently) {
  for (const bool server_dials : {false, true}) {
    show_in_the_end([server_dials] { return one_server_may_be_known_by_two_spellings(server_dials); });
  }
}

bool one_server_at_two_addresses_is_told_that_it_may_be_this_very_channel() {
  TcpOptions everywhere;
  everywhere.peer_init_url = "tcp://0.0.0.0:0";
  Node server(4, everywhere);
  Node client(4, {}, false);
  const std::string url = server.channel->peer_init_url();
  EXPECT_FALSE(connect(client, "a", "b", spelled(url, "127.0.0.1")));
  std::string diagnostic;
  if (!is_refused_for_one_that_lives(
          [&] { return connect(client, "a", "second name of b", spelled(url, "127.0.0.2"), &diagnostic); })) {
    return false;
  }
  EXPECT_NE(diagnostic.find("this very channel"), std::string::npos) << diagnostic;
  EXPECT_FALSE(write_one(client, "b"));
  return true;
}

TEST(SameIdTwice, OneServerAtTwoAddressesSaysThatItMayBeThisVeryChannel) {
  show_in_the_end(one_server_at_two_addresses_is_told_that_it_may_be_this_very_channel);
}

TEST(SameIdTwice, OneWhoseHostVanishedWithoutAWordIsReplaced) {
  RelayedPair pair(4);
  EXPECT_FALSE(write_one(*pair.b, "a"));
  pair.relay.swallow();
  Node again(4, {}, false);
  EXPECT_FALSE(connect(again, "a", "b", pair.b->channel->peer_init_url()));
  EXPECT_EQ(write_one(*pair.b, "a"), errc::peer_restarted);
  EXPECT_FALSE(write_one(*pair.b, "a"));
  EXPECT_EQ(pair.b->channel->stats().peer_replacements, 1U);
  EXPECT_EQ(pair.b->channel->stats().identity_conflicts, 0U);
}

bool one_that_is_frozen_is_replaced_and_refused_when_it_goes_on() {
  FreezableThread thread;
  Node frozen(4, thread.options(), false);
  Node server(4);
  EXPECT_FALSE(connect(frozen, "a", "b", server.channel->peer_init_url()));
  thread.freeze();
  Node again(4, {}, false);
  EXPECT_FALSE(connect(again, "a", "b", server.channel->peer_init_url()));
  thread.go_on();
  std::error_code ec;
  for (int i = 0; i < 100 && ec != errc::identity_conflict; ++i) {
    const SecondToAnswer second;
    ec = write_one(frozen, "b");  // the first may meet the end of the old connection
    if ((!ec || ec == errc::peer_restarted) && second.is_over()) {
      return false;
    }
  }
  EXPECT_EQ(ec, errc::identity_conflict) << ec.message();
  EXPECT_FALSE(write_one(again, "b"));
  return true;
}

TEST(SameIdTwice, OneThatIsFrozenIsReplacedAndRefusedWhenItGoesOn) {
  show_in_the_end(one_that_is_frozen_is_replaced_and_refused_when_it_goes_on);
}

bool no_message_takes_a_connected_peers_place() {
  Node a(4);
  Node b(4);
  Node stranger(1, {}, false);
  EXPECT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
  const auto before = b.channel->peer_info("a").value_or(PeerInfo{});
  for (int i = 0; i < 20; ++i) {
    auto made = question_as_a(1000 + static_cast<std::uint64_t>(i));
    made.init_url = "tcp://127.0.0.1:1";
    if (!is_refused_for_one_that_lives([&] { return ask_as_a(stranger, b, made).first; })) {
      return false;
    }
    EXPECT_FALSE(write_one(a, "b"));
    EXPECT_FALSE(write_one(b, "a"));
  }
  const auto after = b.channel->peer_info("a").value_or(PeerInfo{});
  EXPECT_EQ(after.incarnation, before.incarnation);
  EXPECT_EQ(after.init_url, before.init_url);
  return true;
}

TEST(Strangers, NoMessageTakesAConnectedPeersPlace) { show_in_the_end(no_message_takes_a_connected_peers_place); }

bool an_incarnation_that_is_told_to_anybody_proves_nothing() {
  Node a(4);
  Node b(4);
  Node stranger(1, {}, false);
  EXPECT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
  // The stranger asks "a" who it is, also by the name that "a" knows "b" by, and is told nothing that "b" knows.
  auto who = question();
  who.who = true;
  who.sender_id = "b";
  who.incarnation = a.channel->peer_info("b").value_or(PeerInfo{}).incarnation;
  const auto [ec, answer] = ask_as_a(stranger, a, who);
  EXPECT_FALSE(ec) << ec.message();
  const kit::InitAnswer told = answer.value_or(kit::InitAnswer{});
  EXPECT_EQ(told.incarnation, b.channel->peer_info("a").value_or(PeerInfo{}).incarnation);
  EXPECT_FALSE(told.secret);
  who.who = false;
  if (!is_refused_for_one_that_lives([&] { return ask_as_a(stranger, a, who).first; })) {
    return false;
  }

  auto made = question_as_a(told.incarnation);
  for (const auto& secret : {std::optional<Bytes>(), std::optional(Bytes()), std::optional(Bytes(16))}) {
    made.secret = secret;
    if (!is_refused_for_one_that_lives([&] { return ask_as_a(stranger, b, made).first; })) {
      return false;
    }
  }
  EXPECT_FALSE(write_one(b, "a"));
  EXPECT_EQ(b.channel->stats().peer_replacements, 0U);
  return true;
}

TEST(Strangers, AnIncarnationThatIsToldToAnybodyProvesNothing) {
  show_in_the_end(an_incarnation_that_is_told_to_anybody_proves_nothing);
}

TEST(Strangers, APeerThatIsGoneForAMomentIsStillDialledWhereItIs) {
  Relay relay;
  TcpOptions b_options;
  b_options.advertised_data_address = relay.address();
  Node b(4, b_options);
  relay.set_target(b.channel->data_port());
  Node a(4);
  ASSERT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
  Node stranger(1, {}, false);
  for (int round = 0; round < 3; ++round) {
    auto unmet = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
    relay.cut_after(0);
    std::error_code ec;
    a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}, ec);
    EXPECT_THROW(unmet.get(), std::system_error);
    auto made = question();
    made.sender_id = "b";
    made.incarnation = 5;
    made.init_url = "tcp://127.0.0.1:1";
    made.secret = Bytes(16);
    (void)ask_as_a(stranger, a, made);  // may be taken for b's restart, until it doesn't get through
    EXPECT_FALSE(write_one(a, "b"));
    EXPECT_EQ(a.channel->peer_info("b")->init_url, b.channel->peer_init_url());
  }
}

TEST(Strangers, WhoComesFirstAndMakesNoConnectionKeepsNobodyFromAPeerOfThatName) {
  TcpOptions patient;
  patient.handshake_timeout = 4 * long_enough;
  Node a(4, patient);
  Node b(4);
  Node stranger(1, {}, false);
  const auto [ec, answer] = ask_as(stranger, "b", a, "a", 1);
  ASSERT_FALSE(ec) << ec.message();
  ASSERT_EQ(answer->status, kit::InitAnswer::ok);
  std::string diagnostic;
  std::error_code failed;
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {},
                                       {.timeout = long_enough, .diagnostic = &diagnostic}, failed);
  EXPECT_FALSE(failed) << diagnostic;
  EXPECT_FALSE(write_one(a, "b"));
  EXPECT_FALSE(write_one(b, "a"));
}

TEST(Strangers, NobodyEndsTheFirstDialToAPeer) {
  TcpOptions patient;
  patient.handshake_timeout = 4 * long_enough;
  FreezableThread thread;
  Node a(4, patient);
  Node b(4, thread.options());
  Node stranger(1, {}, false);
  thread.freeze();
  std::string diagnostic;
  auto connecting = a.channel->async_lazy_init_peer_connection(
      "a", "b", b.channel->peer_init_url(), {}, {.timeout = long_enough, .diagnostic = &diagnostic}, asio::use_future);
  int accepted = 0;
  for (int i = 0; i < 3; ++i) {
    const auto [ec, answer] = ask_as(stranger, "b", a, "a", 1);  // a number that wins against a's
    ASSERT_FALSE(ec) << ec.message();
    accepted += answer->status == kit::InitAnswer::ok ? 1 : 0;
  }
  EXPECT_GT(accepted, 0);
  thread.go_on();
  EXPECT_NO_THROW(connecting.get()) << diagnostic;
  EXPECT_FALSE(write_one(a, "b"));
  EXPECT_FALSE(write_one(b, "a"));
}

TEST(Notifications, NameTheIncarnationOfThePeerThatAttachedThem) {
  Node b(4);
  const std::vector<std::byte> note(1);
  const auto first_page = indexes(1);
  std::vector<std::uint64_t> incarnations;
  for (int round = 0; round < 2; ++round) {
    Node a(4, {}, false);
    ASSERT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
    incarnations.push_back(b.channel->peer_info("a")->incarnation);
    EXPECT_EQ(
        a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = first_page, .notification = note}), 1U);
  }
  EXPECT_NE(incarnations[0], incarnations[1]);
  EXPECT_EQ(b.channel->receive_notification(long_enough).incarnation, incarnations[0]);
  EXPECT_EQ(b.channel->receive_notification(long_enough).incarnation, incarnations[1]);
}

}  // namespace
}  // namespace kvferry::tcp::testing
