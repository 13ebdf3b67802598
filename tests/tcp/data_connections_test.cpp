// SPDX-License-Identifier: Apache-2.0
// Data connections that don't belong to a peer, and ports that can't be used.
#include <gtest/gtest.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <array>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "init_question.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// A connection to a channel's data port that is no peer.
class Intruder {
 public:
  explicit Intruder(std::uint16_t port) : socket_(context_) {
    socket_.connect({asio::ip::make_address("127.0.0.1"), port});
  }
  void send(std::span<const std::byte> bytes) {
    std::error_code ignored;
    asio::write(socket_, asio::buffer(bytes.data(), bytes.size()), ignored);
  }
  /// Waits until all of that is in the other side's socket, which stays open.
  void wait_until_delivered() {
    for (int unacknowledged = 1; unacknowledged != 0;) {
      ASSERT_EQ(::ioctl(socket_.native_handle(), SIOCOUTQ, &unacknowledged), 0);
    }
  }
  /// Waits for the other side to close, and tells whether it sent anything before.
  [[nodiscard]] bool closed_without_a_word() {
    std::array<std::byte, 64> bytes{};
    std::error_code ec;
    return socket_.read_some(asio::buffer(bytes), ec) == 0 && ec;
  }

 private:
  asio::io_context context_;
  asio::ip::tcp::socket socket_;
};

TEST(DataConnections, StrangersAreRefusedAndDisturbNobody) {
  TcpOptions options;
  options.hello_timeout = long_enough;
  Node a(4);
  Node b(4, options);
  options.hello_timeout = milliseconds(200);
  Node c(4, options);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  // On a busy machine an honest hello may be late as well.
  std::error_code ec = errc::timed_out;
  for (int attempt = 0; ec && attempt < 20; ++attempt) {
    a.channel->lazy_init_peer_connection("a", "c", c.channel->peer_init_url(), {}, {}, ec);
  }
  ASSERT_FALSE(ec) << ec.message();
  const std::uint16_t port = b.channel->data_port();
  const auto refused = [](const Node& node, bool late) {
    std::uint64_t strangers = 0;
    for (const auto& [cause, count] : node.channel->stats().refused_strangers) {
      strangers += (cause == errc::timed_out) == late ? count : 0;
    }
    return strangers;
  };
  const std::uint64_t late_before = refused(c, true);

  Intruder garbage(port);
  garbage.send(std::vector<std::byte>(1000, std::byte{0x55}));
  EXPECT_TRUE(garbage.closed_without_a_word());

  Hello hello;
  hello.lane_count = 1;
  hello.secret = random_secret();
  Intruder guessing(port);
  guessing.send(std::as_bytes(std::span(&hello, 1)));
  EXPECT_TRUE(guessing.closed_without_a_word());

  Intruder silent(c.channel->data_port());
  EXPECT_TRUE(silent.closed_without_a_word());

  EXPECT_EQ(refused(b, false), 2U);
  EXPECT_EQ(refused(b, true), 0U);
  EXPECT_EQ(refused(c, false), 0U);
  EXPECT_EQ(refused(c, true), late_before + 1);

  for (const char* const peer : {"b", "c"}) {
    EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = peer, .remote_indexes = indexes(4)}), 4U);
  }
}

TEST(DataConnections, ASecretServesOneHandshakeOnly) {
  Node b(4);
  Node asking(4);
  const auto answer = decode_side_message<kit::InitAnswer>(
      asking.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(question())));
  std::error_code ec;
  const auto endpoint = decode_side_message<AcceptEndpoint>(parse_side_message(answer.endpoint, ec));
  ASSERT_FALSE(ec);
  Hello hello;
  hello.lane_count = 1;
  hello.incarnation = question().incarnation;
  std::ranges::copy(endpoint.dial_secret, hello.secret.begin());
  const std::uint16_t port = b.channel->data_port();

  Hello wrong = hello;
  wrong.incarnation ^= 1;
  Intruder other_incarnation(port);
  other_incarnation.send(std::as_bytes(std::span(&wrong, 1)));
  EXPECT_TRUE(other_incarnation.closed_without_a_word());
  wrong = hello;
  wrong.lane = 1;
  Intruder other_lane(port);
  other_lane.send(std::as_bytes(std::span(&wrong, 1)));
  EXPECT_TRUE(other_lane.closed_without_a_word());

  Intruder rightful(port);
  rightful.send(std::as_bytes(std::span(&hello, 1)));
  EXPECT_FALSE(rightful.closed_without_a_word());
  Intruder replay(port);
  replay.send(std::as_bytes(std::span(&hello, 1)));
  EXPECT_TRUE(replay.closed_without_a_word());
}

TEST(DataConnections, AnAcceptingSideWithoutTheSecretIsRefused) {
  // Something else listens where the peer says its data port is: it can't say the welcome that was agreed upon.
  asio::io_context context;
  asio::ip::tcp::acceptor impostor(context, {asio::ip::make_address("127.0.0.1"), 0});
  TcpOptions options;
  options.advertised_data_address = "127.0.0.1:" + std::to_string(impostor.local_endpoint().port());
  Node b(4, options);
  Node a(4, {}, false);
  std::thread listener([&] {
    asio::ip::tcp::socket socket = impostor.accept();
    Hello welcome;
    welcome.magic = Hello::accepting;
    asio::write(socket, asio::buffer(&welcome, sizeof(welcome)));
    std::array<std::byte, 256> rest{};
    std::error_code ignored;
    while (!ignored) {
      socket.read_some(asio::buffer(rest), ignored);
    }
  });
  std::error_code ec;
  std::string diagnostic;
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {.diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, errc::authentication_failed) << diagnostic;
  EXPECT_FALSE(a.channel->remote_xfer_handler_exists("b"));
  listener.join();
}

TEST(DataConnections, AnAcceptingSideThatClosesBeforeItsWelcomeIsAFailedPeer) {
  asio::io_context context;
  asio::ip::tcp::acceptor dying(context, {asio::ip::make_address("127.0.0.1"), 0});
  TcpOptions options;
  options.advertised_data_address = "127.0.0.1:" + std::to_string(dying.local_endpoint().port());
  Node b(4, options);
  Node a(4, {}, false);
  std::thread listener([&] {
    asio::ip::tcp::socket socket = dying.accept();
    Hello hello;
    asio::read(socket, asio::buffer(&hello, sizeof(hello)));  // so that its end is no reset
  });
  std::error_code ec;
  std::string diagnostic;
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {.diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, errc::peer_closed) << diagnostic;
  EXPECT_EQ(ec, condition::retryable);
  EXPECT_NE(diagnostic.find("before it was welcomed"), std::string::npos) << diagnostic;
  listener.join();
}

TEST(DataConnections, AHelloThatIsWrongInAnyFieldIsRefused) {
  const std::vector<std::pair<const char*, void (*)(Hello&)>> changes = {
      {"magic", [](Hello& hello) { hello.magic = Hello::accepting; }},
      {"version", [](Hello& hello) { ++hello.version; }},
      {"lane that is taken", [](Hello& hello) { hello.lane = 0; }},
      {"lane count", [](Hello& hello) { ++hello.lane_count; }},
      {"incarnation", [](Hello& hello) { hello.incarnation ^= 1; }},
      {"secret", [](Hello& hello) { hello.secret[0] ^= std::byte{1}; }},
  };
  TcpOptions options;
  options.lanes_per_peer = 2;
  Node b(4, options);
  Node asking(4);
  auto two_lanes = question();
  two_lanes.endpoint = encode_side_message(DialEndpoint{2}).encoded();
  const auto answer = decode_side_message<kit::InitAnswer>(
      asking.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(two_lanes)));
  std::error_code ec;
  const auto endpoint = decode_side_message<AcceptEndpoint>(parse_side_message(answer.endpoint, ec));
  ASSERT_FALSE(ec);
  Hello hello;
  hello.lane_count = 2;
  hello.incarnation = two_lanes.incarnation;
  std::ranges::copy(endpoint.dial_secret, hello.secret.begin());
  Intruder first(b.channel->data_port());
  first.send(std::as_bytes(std::span(&hello, 1)));
  first.wait_until_delivered();  // so it is heard before those that come later
  hello.lane = 1;
  for (const auto& [field, change] : changes) {
    Hello wrong = hello;
    change(wrong);
    Intruder intruder(b.channel->data_port());
    intruder.send(std::as_bytes(std::span(&wrong, 1)));
    EXPECT_TRUE(intruder.closed_without_a_word()) << field;
  }
  Intruder second(b.channel->data_port());
  second.send(std::as_bytes(std::span(&hello, 1)));
  EXPECT_FALSE(first.closed_without_a_word());
  EXPECT_FALSE(second.closed_without_a_word());
}

TEST(DataConnections, AWelcomeThatIsWrongInAnyFieldIsRefusedAtOnce) {
  const std::vector<std::pair<const char*, void (*)(Hello&)>> changes = {
      {"magic", [](Hello& welcome) { welcome.magic = Hello::dialing; }},
      {"version", [](Hello& welcome) { ++welcome.version; }},
      {"lane", [](Hello& welcome) { welcome.lane = 1; }},
      {"lane count", [](Hello& welcome) { ++welcome.lane_count; }},
      {"secret", [](Hello& welcome) { welcome.secret[0] ^= std::byte{1}; }},
      {"incarnation", [](Hello& welcome) { welcome.incarnation ^= 1; }},
  };
  for (const auto& [field, change] : changes) {
    // The bytes of "b" on its data connection pass somebody who changes the welcome.
    asio::io_context context;
    asio::ip::tcp::acceptor between(context, {asio::ip::make_address("127.0.0.1"), 0});
    TcpOptions options;
    options.advertised_data_address = "127.0.0.1:" + std::to_string(between.local_endpoint().port());
    Node b(4, options);
    Node a(4, {}, false);
    std::thread changing([&, change = change] {
      asio::ip::tcp::socket near = between.accept();
      asio::ip::tcp::socket far(context);
      far.connect({asio::ip::make_address("127.0.0.1"), b.channel->data_port()});
      Hello hello;
      asio::read(near, asio::buffer(&hello, sizeof(hello)));
      asio::write(far, asio::buffer(&hello, sizeof(hello)));
      asio::read(far, asio::buffer(&hello, sizeof(hello)));
      change(hello);
      asio::write(near, asio::buffer(&hello, sizeof(hello)));
      std::array<std::byte, 256> rest{};
      std::error_code ignored;
      while (!ignored) {
        near.read_some(asio::buffer(rest), ignored);
      }
    });
    std::error_code ec;
    std::string diagnostic;
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {.diagnostic = &diagnostic}, ec);
    EXPECT_EQ(ec, errc::authentication_failed) << field << ": " << diagnostic;
    EXPECT_FALSE(a.channel->remote_xfer_handler_exists("b")) << field;
    a.channel.reset();
    changing.join();
  }
}

TEST(DataConnections, AClosedChannelLeavesNoneThatItWasMaking) {
  asio::io_context context;
  asio::ip::tcp::acceptor mute(context, {asio::ip::make_address("127.0.0.1"), 0});
  TcpOptions patient;
  patient.handshake_timeout = std::chrono::hours(1);
  patient.advertised_data_address = "127.0.0.1:" + std::to_string(mute.local_endpoint().port());
  Node b(4, patient);
  // On an executor of the user's, which goes on when the channel is closed.
  asio::io_context users;
  auto work = asio::make_work_guard(users);
  std::thread thread([&] { users.run(); });
  TcpOptions options;
  options.executor = users.get_executor();
  options.handshake_timeout = std::chrono::hours(1);
  Node a(4, options, false);
  auto connecting = a.channel->async_lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {},
                                                               {.timeout = std::chrono::hours(1)}, asio::use_future);
  asio::ip::tcp::socket socket = mute.accept();
  std::array<std::byte, sizeof(Hello)> hello{};
  asio::read(socket, asio::buffer(hello));
  a.channel->close();
  EXPECT_THROW(connecting.get(), std::system_error);
  pollfd closed{socket.native_handle(), POLLIN | POLLRDHUP, 0};
  EXPECT_EQ(::poll(&closed, 1, static_cast<int>(milliseconds(long_enough).count())), 1) << "its socket is open still";
  a.channel.reset();
  work.reset();
  users.stop();
  thread.join();
}

TEST(DataConnections, MoreStrangersThanPlacesDoNotKeepAPeerOut) {
  TcpOptions options;
  options.hello_timeout = long_enough;
  Node b(4, options);
  std::vector<std::unique_ptr<Intruder>> strangers;
  for (int i = 0; i < 400; ++i) {
    strangers.push_back(std::make_unique<Intruder>(b.channel->data_port()));
  }
  Node a(4, {}, false);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
}

TEST(DataConnections, AnUnreachableDataPortIsNamed) {
  asio::io_context context;
  asio::ip::tcp::socket closed(context, {asio::ip::make_address("127.0.0.1"), 0});  // nobody listens there meanwhile
  const auto port = closed.local_endpoint().port();
  TcpOptions options;
  options.advertised_data_address = "127.0.0.1:" + std::to_string(port);
  Node b(4, options);
  Node a(4, {}, false);
  std::error_code ec;
  std::string diagnostic;
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {.diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  EXPECT_NE(diagnostic.find(std::to_string(port)), std::string::npos) << diagnostic;
}

TEST(DataConnections, ATakenDataPortIsNamed) {
  asio::io_context context;
  asio::ip::tcp::acceptor taken(context, {asio::ip::make_address("127.0.0.1"), 0});
  TcpOptions options;
  options.data_port = taken.local_endpoint().port();
  try {
    Node b(4, options);
    FAIL() << "two listeners at one port";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::address_in_use);
    EXPECT_NE(std::string(error.what()).find(std::to_string(options.data_port)), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
