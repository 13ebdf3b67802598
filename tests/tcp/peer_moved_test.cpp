// SPDX-License-Identifier: Apache-2.0
// Peers that move: a server at another url takes the place of the old one, or doesn't.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <future>
#include <string>
#include <system_error>

#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

TEST(PeerMoved, TheServerAtTheNewUrlTakesThePlaceOfTheOldOne) {
  Node a(4, {}, false);
  a.fill(1);
  Node first(4);
  Node second(4);
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  const auto before = a.channel->peer_info("b");
  auto in_flight = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);

  ASSERT_FALSE(connect(a, "a", "b", second.channel->peer_init_url()));
  const auto after = a.channel->peer_info("b");
  ASSERT_TRUE(before && after);
  EXPECT_NE(after->incarnation, before->incarnation);
  EXPECT_EQ(after->init_url, second.channel->peer_init_url());
  try {
    in_flight.get();
    FAIL() << "what was under way to the old server succeeded";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::peer_restarted);
  }
  EXPECT_FALSE(write_one(a, "b"));
  EXPECT_EQ(std::ranges::count(first.memory, std::byte{0}), static_cast<std::ptrdiff_t>(first.memory.size()));
  EXPECT_TRUE(std::ranges::equal(second.page(0), a.page(0)));
  EXPECT_EQ(a.channel->stats().peer_replacements, 1U);

  // And back.
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  EXPECT_EQ(a.channel->peer_info("b")->incarnation, before->incarnation);
  EXPECT_FALSE(write_one(a, "b"));
  EXPECT_TRUE(std::ranges::equal(first.page(0), a.page(0)));
}

bool the_same_server_under_another_spelling_of_its_url_keeps_its_connection() {
  Node a(4, {}, false);
  Node b(4);
  const auto path_to_b = [&a] { return a.channel->peer_info("b").value_or(PeerInfo{}).path; };
  EXPECT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
  const std::string path = path_to_b();
  auto recv = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
  const std::string other = "tcp://localhost:" + std::to_string(parse_url(b.channel->peer_init_url()).port);
  const SecondToAnswer second;
  EXPECT_FALSE(connect(a, "a", "b", other));
  if (second.is_over() && path_to_b() != path) {
    return false;
  }
  EXPECT_EQ(path_to_b(), path);
  EXPECT_EQ(a.channel->peer_info("b").value_or(PeerInfo{}).init_url, other);
  EXPECT_EQ(b.channel->batched_send(b.pages(1), {.peer_id = "a"}), 1U);
  EXPECT_EQ(recv.get(), 1U);
  EXPECT_EQ(a.channel->stats().peer_replacements, 0U);
  return true;
}

TEST(PeerMoved, TheSameServerUnderAnotherSpellingOfItsUrlKeepsItsConnection) {
  show_in_the_end(the_same_server_under_another_spelling_of_its_url_keeps_its_connection);
}

TEST(PeerMoved, WhereNobodyAnswersAtTheNewUrlTheCallerHearsSoAndThePeerStays) {
  asio::io_context context;
  asio::ip::tcp::acceptor mute(context, {asio::ip::make_address("127.0.0.1"), 0});
  Node a(4, {}, false);
  Node b(4);
  ASSERT_FALSE(connect(a, "a", "b", b.channel->peer_init_url()));
  std::error_code ec;
  a.channel->lazy_init_peer_connection("a", "b", "tcp://127.0.0.1:" + std::to_string(mute.local_endpoint().port()), {},
                                       {.timeout = milliseconds(200)}, ec);
  EXPECT_EQ(ec, condition::timed_out) << ec.message();
  EXPECT_EQ(a.channel->peer_info("b")->init_url, b.channel->peer_init_url());
  EXPECT_FALSE(write_one(a, "b"));
}

/// Its data connections come to `data`, and end there before they are welcomed.
struct ServerThatDoesNotWelcome {
  asio::io_context context;
  asio::ip::tcp::acceptor data{context, {asio::ip::make_address("127.0.0.1"), 0}};
  Node node{4, options()};

 private:
  [[nodiscard]] TcpOptions options() const {
    TcpOptions made;
    made.advertised_data_address = "127.0.0.1:" + std::to_string(data.local_endpoint().port());
    return made;
  }
};

TEST(PeerMoved, WhoeverAsksForTheNewUrlHearsWhatBecomesOfIt) {
  Node first(4);
  ServerThatDoesNotWelcome second;
  Node a(4, {}, false);
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  const auto move = [&] {
    return a.channel->async_lazy_init_peer_connection("a", "b", second.node.channel->peer_init_url(), {},
                                                      {.timeout = long_enough}, asio::use_future);
  };
  auto one = move();
  asio::ip::tcp::socket socket = second.data.accept();  // the move is under way
  auto other = move();
  std::array<std::byte, sizeof(Hello)> hello{};
  asio::read(socket, asio::buffer(hello));
  socket.close();
  for (auto* const moved : {&one, &other}) {
    try {
      moved->get();
      FAIL();
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::peer_closed) << error.code().message();
    }
  }
  EXPECT_FALSE(write_one(a, "b")) << "it is where it was";
}

TEST(PeerMoved, WhoSaidThatItIsElsewhereIsNotToldOfAThirdUrlsSuccess) {
  Node first(4);
  ServerThatDoesNotWelcome second;
  Node third(4);
  Node a(4, {}, false);
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  auto to_second = a.channel->async_lazy_init_peer_connection("a", "b", second.node.channel->peer_init_url(), {},
                                                              {.timeout = long_enough}, asio::use_future);
  asio::ip::tcp::socket held = second.data.accept();  // the move is under way
  ASSERT_FALSE(connect(a, "a", "b", third.channel->peer_init_url()));
  held.close();
  // It is tried once more, and doesn't work.
  second.data.non_blocking(true);
  while (to_second.wait_for(milliseconds(10)) != std::future_status::ready) {
    std::error_code ec;
    (void)second.data.accept(ec);
  }
  EXPECT_THROW((void)to_second.get(), std::system_error) << "it was told that the peer is there";
  EXPECT_EQ(a.channel->peer_info("b")->init_url, third.channel->peer_init_url());
}

TEST(PeerMoved, AFrozenServerDoesNotKeepTheNewOneOut) {
  FreezableThread thread;
  Node first(4, thread.options());
  Node a(4, {}, false);
  Node second(4);
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  thread.freeze();
  EXPECT_FALSE(connect(a, "a", "b", second.channel->peer_init_url()));
  EXPECT_FALSE(write_one(a, "b"));
  thread.go_on();
}

TEST(PeerMoved, WhatWasUnderWayToTheOldServerMayStillLandThere) {
  FreezableThread thread;
  Node first(4, thread.options());
  Node a(4, {}, false);
  std::ranges::fill(a.memory, std::byte{0xaa});
  Node second(4);
  ASSERT_FALSE(connect(a, "a", "b", first.channel->peer_init_url()));
  thread.freeze();
  const auto pages = indexes(4);
  auto write = a.channel->async_batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = pages}, asio::use_future);
  EXPECT_FALSE(connect(a, "a", "b", second.channel->peer_init_url()));
  try {
    write.get();
    ADD_FAILURE() << "a server that is frozen can't have answered";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::peer_restarted_in_flight) << error.code().message();
  }
  thread.go_on();
  first.channel->fence("a");
  const auto fenced = first.memory;
  EXPECT_FALSE(write_one(a, "b"));
  first.channel.reset();
  EXPECT_EQ(first.memory, fenced);
}

}  // namespace
}  // namespace kvferry::tcp::testing
