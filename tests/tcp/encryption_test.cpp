// SPDX-License-Identifier: Apache-2.0
// Encrypted data connections: nothing of what travels can be read or changed on the way, and nothing falls back.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <poll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp/hello.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t encrypted_pages = 1024;  // 4 MiB

TcpOptions with_keys(Encryption encryption = Encryption::with_keyring) {
  TcpOptions options;
  options.keyring = group_keyring();
  options.encryption = encryption;
  return options;
}

std::error_code connect(Node& from, Node& to, std::string* diagnostic = nullptr,
                        std::optional<milliseconds> timeout = std::nullopt) {
  std::error_code ec;
  (void)from.channel->lazy_init_peer_connection("a", "b", to.channel->peer_init_url(), std::nullopt,
                                                {timeout, diagnostic}, ec);
  return ec;
}

TEST(Encryption, PagesOfAllSizesMoveOverSeveralLanesAndTheirPathSaysSo) {
  TcpOptions options = with_keys();
  options.lanes_per_peer = 3;
  Node a(encrypted_pages, options, false);
  Node b(encrypted_pages, options);
  ASSERT_FALSE(connect(a, b));
  const std::string path = a.channel->peer_info("b")->path;
  EXPECT_NE(path.find("3 lanes"), std::string::npos) << path;
  EXPECT_NE(path.find(", TLS 1.3 "), std::string::npos) << path;
  for (const std::size_t count : {std::size_t{1}, std::size_t{7}, encrypted_pages}) {
    a.fill(static_cast<unsigned>(count));
    const auto all = indexes(count);
    EXPECT_EQ(a.channel->batched_write(a.pages(count), {.peer_id = "b", .remote_indexes = all}), count);
    EXPECT_TRUE(std::equal(a.memory.begin(), a.memory.begin() + static_cast<std::ptrdiff_t>(count * page_size),
                           b.memory.begin()));
    b.fill(static_cast<unsigned>(count) + 1);
    EXPECT_EQ(a.channel->batched_read(a.pages(count), {.peer_id = "b", .remote_indexes = all}), count);
    EXPECT_TRUE(std::equal(a.memory.begin(), a.memory.begin() + static_cast<std::ptrdiff_t>(count * page_size),
                           b.memory.begin()));
  }
}

TEST(Encryption, ACaptureOfBothPortsShowsNothing) {
  constexpr std::string_view pattern = "pages of a model's cache";
  const std::string notification = "they are there now";
  for (const auto encryption : {Encryption::off, Encryption::required}) {
    Relay handshakes;
    Relay data;
    handshakes.record();
    data.record();
    TcpOptions b_options = with_keys(encryption);
    b_options.advertised_data_address = data.address();
    Node a(16, with_keys(encryption), false);
    Node b(16, std::move(b_options));
    handshakes.set_target(parse_url(b.channel->peer_init_url()).port);
    data.set_target(b.channel->data_port());
    a.channel->lazy_init_peer_connection("prefilling-server", "decoding-server", "tcp://" + handshakes.address());
    for (std::size_t i = 0; i + pattern.size() <= a.memory.size(); i += pattern.size()) {
      std::memcpy(a.memory.data() + i, pattern.data(), pattern.size());
    }
    const auto all = indexes(16);
    EXPECT_EQ(a.channel->batched_write(a.pages(16), {.peer_id = "decoding-server",
                                                     .remote_indexes = all,
                                                     .notification = std::as_bytes(std::span(notification))}),
              16U);
    EXPECT_EQ(b.memory, a.memory);
    const auto came = b.channel->receive_notification(long_enough);
    EXPECT_EQ(came.payload.size(), notification.size());
    EXPECT_EQ(a.channel->batched_read(a.pages(16), {.peer_id = "decoding-server", .remote_indexes = all}), 16U);
    const std::string bytes = data.recorded(true) + data.recorded(false);
    const std::string asked = handshakes.recorded(true) + handshakes.recorded(false);
    ASSERT_GT(bytes.size(), 2 * a.memory.size());
    ASSERT_GT(asked.size(), 500U);
    const bool hidden = encryption == Encryption::required;
    // The magic numbers of the hello and the welcome, with which their secrets begin.
    for (const std::string_view word :
         {pattern, std::string_view(notification), std::string_view("KVFHELLO"), std::string_view("KVFWELCM")}) {
      EXPECT_EQ(bytes.find(word) == std::string::npos, hidden) << word;
    }
    for (const std::string_view word : {"prefilling-server", "decoding-server", "tls_secret", "tls_identity"}) {
      EXPECT_EQ(bytes.find(word), std::string::npos) << word;
      EXPECT_EQ(asked.find(word), std::string::npos) << word;
    }
  }
}

TEST(Encryption, EncryptedAndPlainDoNotMeet) {
  for (const bool dialing : {true, false}) {
    Node a(4, with_keys(dialing ? Encryption::required : Encryption::off), false);
    Node b(4, with_keys(dialing ? Encryption::off : Encryption::required));
    std::string diagnostic;
    EXPECT_EQ(connect(a, b, &diagnostic), errc::encryption_mismatch) << diagnostic;
    // As b says, who answers.
    EXPECT_NE(diagnostic.find(dialing ? "encryption: off or unknown here, with_keyring or required at peer 'a'"
                                      : "encryption: with_keyring or required here, off or unknown at peer 'a'"),
              std::string::npos)
        << diagnostic;
    EXPECT_EQ(b.channel->stats().handshakes.accepted, 0U);
  }
}

TEST(Encryption, AKeyringTurnsItOnAndNothingElseDoes) {
  Node plain(4);
  Node secured(4, with_keys());
  Node not_encrypted(4, with_keys(Encryption::off));
  Node other(4, with_keys(Encryption::required));
  EXPECT_EQ(connect(not_encrypted, other), errc::encryption_mismatch);
  EXPECT_FALSE(connect(secured, other));
  Node dialing(4, {}, false);
  EXPECT_FALSE(connect(dialing, plain));
  EXPECT_EQ(dialing.channel->peer_info("b")->path.find("TLS"), std::string::npos);
  TcpOptions options;
  options.encryption = Encryption::required;
  try {
    const Node made(4, options);
    FAIL() << "a key without a keyring would be told to everybody";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::invalid_argument) << error.what();
    EXPECT_NE(std::string_view(error.what()).find("encryption"), std::string_view::npos) << error.what();
  }
}

TEST(Encryption, WhereItIsRequiredNoChannelIsMadeThatDoesWithout) {
  const auto made = [](TcpOptions options) {
    options.require_encryption = true;
    try {
      const Node node(4, options);
      return std::error_code();
    } catch (const TransferError& error) {
      EXPECT_NE(std::string_view(error.what()).find("'tcp' would move pages off this host unencrypted"),
                std::string_view::npos)
          << error.what();
      return error.code();
    }
  };
  EXPECT_EQ(made({}), std::errc::invalid_argument);
  EXPECT_EQ(made(with_keys(Encryption::off)), std::errc::invalid_argument);
  EXPECT_FALSE(made(with_keys()));
}

TEST(Encryption, AFlippedBitBreaksTheConnectionAndNeverLands) {
  for (const bool towards_server : {true, false}) {
    for (const std::size_t after : {std::size_t{3}, std::size_t{9}, std::size_t{700'000}, std::size_t{1'234'567}}) {
      RelayedPair pair(encrypted_pages, with_keys());
      pair.a.fill(1);
      pair.b->fill(2);
      const auto a_before = pair.a.memory;
      const auto b_before = pair.b->memory;
      const auto all = indexes(encrypted_pages);
      pair.relay.flip_after(after, towards_server);
      std::error_code ec;
      if (towards_server) {
        (void)pair.a.channel->batched_write(pair.a.pages(encrypted_pages), {.peer_id = "b", .remote_indexes = all}, ec);
      } else {
        (void)pair.a.channel->batched_read(pair.a.pages(encrypted_pages), {.peer_id = "b", .remote_indexes = all}, ec);
      }
      EXPECT_TRUE(ec) << after;
      EXPECT_NE(ec, errc::timed_out) << after;
      const auto& source = towards_server ? a_before : b_before;
      const auto& target = towards_server ? pair.b->memory : pair.a.memory;
      const auto& target_before = towards_server ? b_before : a_before;
      std::size_t wrong = 0;
      std::size_t kept = 0;
      for (std::size_t i = 0; i < source.size(); ++i) {
        wrong += target[i] != source[i] && target[i] != target_before[i] ? 1U : 0U;
        kept += target[i] != source[i] ? 1U : 0U;
      }
      EXPECT_EQ(wrong, 0U) << after;
      EXPECT_NE(kept, 0U) << after << ": the record that was changed, and all behind it";
    }
  }
}

TEST(Encryption, AConnectionThatIsCutWithinARecordEndsWhatIsOnItAndIsMadeAnew) {
  RelayedPair pair(encrypted_pages, with_keys());
  pair.a.fill(1);
  const auto all = indexes(encrypted_pages);
  pair.relay.cut_after(1'000'000);
  std::error_code ec;
  (void)pair.a.channel->batched_write(pair.a.pages(encrypted_pages), {.peer_id = "b", .remote_indexes = all}, ec);
  EXPECT_TRUE(ec);
  EXPECT_NE(ec, errc::timed_out);
  pair.a.channel->lazy_init_peer_connection("a", "b", pair.b->channel->peer_init_url());
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.pages(encrypted_pages), {.peer_id = "b", .remote_indexes = all}),
            encrypted_pages);
  EXPECT_EQ(pair.a.memory, pair.b->memory);
}

TEST(Encryption, AnEndThatThePeerHasNotSaidIsALostConnection) {
  RelayedPair pair(4, with_keys());
  std::promise<std::error_code> ended;
  std::vector<MutableBuffer> buffers = pair.a.pages(1);
  pair.a.channel->async_batched_recv(buffers, {.peer_id = "b", .tag = 1},
                                     [&ended](std::error_code ec, std::size_t) { ended.set_value(ec); });
  pair.relay.half_close();
  EXPECT_EQ(ended.get_future().get(), errc::connection_lost);
  // One that it has said.
  RelayedPair other(4, with_keys());
  std::promise<std::error_code> closed;
  buffers = other.a.pages(1);
  other.a.channel->async_batched_recv(buffers, {.peer_id = "b", .tag = 1},
                                      [&closed](std::error_code ec, std::size_t) { closed.set_value(ec); });
  other.b->channel->close();
  EXPECT_EQ(closed.get_future().get(), errc::peer_closed);
}

/// The bytes that a stranger at the data port gets before it is turned away.
std::string heard_for(std::uint16_t port, std::string_view said, std::error_code& ec) {
  asio::io_context context;
  asio::ip::tcp::socket socket(context);
  socket.connect({asio::ip::address_v4::loopback(), port});
  asio::write(socket, asio::buffer(said), ec);
  std::string heard;
  std::array<char, 4096> buffer{};
  ec.clear();
  while (!ec) {
    heard.append(buffer.data(), socket.read_some(asio::buffer(buffer), ec));
  }
  return heard;
}

std::uint64_t refused(Node& node, errc cause) {
  std::uint64_t count = 0;
  for (const auto& strangers : node.channel->stats().refused_strangers) {
    count += strangers.cause == cause ? strangers.count : 0;
  }
  return count;
}

TEST(Encryption, StrangersHearNothingAndAreBoundedInTime) {
  TcpOptions options = with_keys();
  options.hello_timeout = long_enough;
  Relay relay;
  relay.record();
  options.advertised_data_address = relay.address();
  Node b(4, options);
  relay.set_target(b.channel->data_port());
  Node a(4, with_keys(), false);
  ASSERT_FALSE(connect(a, b));
  std::string opening = relay.recorded(true);
  const auto length = 5 + (static_cast<unsigned char>(opening[3]) << 8) + static_cast<unsigned char>(opening[4]);
  opening.resize(static_cast<std::size_t>(length));

  std::error_code ec;
  Hello hello;  // of a plain dialer's
  EXPECT_EQ(heard_for(b.channel->data_port(), {reinterpret_cast<const char*>(&hello), sizeof(hello)}, ec), "");
  EXPECT_EQ(heard_for(b.channel->data_port(), "GET / HTTP/1.1\r\n\r\n", ec), "");
  EXPECT_EQ(heard_for(b.channel->data_port(), opening, ec), "") << "a recorded one, whose handshake is over";
  std::string large = opening;
  large[3] = 0x40;
  EXPECT_EQ(heard_for(b.channel->data_port(), large, ec), "") << "one that announces 16 KiB";
  EXPECT_EQ(refused(b, errc::authentication_failed), 4U);
  EXPECT_EQ(refused(b, errc::timed_out), 0U);
  TcpOptions impatient = with_keys();
  impatient.hello_timeout = milliseconds(50);
  Node c(4, std::move(impatient));
  EXPECT_EQ(heard_for(c.channel->data_port(), std::string_view(opening).substr(0, 100), ec), "")
      << "it stops within it";
  EXPECT_EQ(refused(c, errc::timed_out), 1U);
  // Nobody was disturbed.
  const auto all = indexes(4);
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = all}), 4U);
}

/// The next connection. @return one that isn't open if none comes.
asio::ip::tcp::socket accept_in_time(asio::ip::tcp::acceptor& acceptor, milliseconds time = long_enough) {
  pollfd waiting{acceptor.native_handle(), POLLIN, 0};
  asio::ip::tcp::socket socket(acceptor.get_executor());
  if (::poll(&waiting, 1, static_cast<int>(time.count())) == 1) {
    acceptor.accept(socket);
  }
  return socket;
}

TEST(Encryption, ADialWaitsForWhoIsSilentComesAgainWhenToldOrResetAndEndsWhereNoKeyIs) {
  asio::io_context context;
  asio::ip::tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), 0});
  TcpOptions options = with_keys();
  options.advertised_data_address = "127.0.0.1:" + std::to_string(acceptor.local_endpoint().port());
  Node b(4, std::move(options));
  Node a(4, with_keys(), false);
  std::string diagnostic;
  // On a busy machine the handshake alone may take its time.
  for (const int time : {300, 3000, 30'000}) {
    EXPECT_EQ(connect(a, b, &diagnostic, milliseconds(time)), errc::timed_out) << diagnostic;
    if (accept_in_time(acceptor, milliseconds(0)).is_open()) {
      break;
    }
    ASSERT_NE(time, 30'000) << "no data connection was made";
  }

  auto answering = std::async(std::launch::async, [&] {
    std::error_code ignored;
    Hello again;
    again.magic = Hello::come_again;
    std::array<char, 5> header{};
    // Reset within TLS's handshake, as by a peer that has to make room.
    asio::ip::tcp::socket socket = accept_in_time(acceptor);
    asio::read(socket, asio::buffer(header), ignored);
    socket.set_option(asio::socket_base::linger(true, 0), ignored);
    socket.close(ignored);
    socket = accept_in_time(acceptor);
    asio::write(socket, asio::buffer(&again, sizeof(again)), ignored);
    socket.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
    const asio::ip::tcp::socket told = std::move(socket);
    socket = accept_in_time(acceptor);
    header = {};
    asio::read(socket, asio::buffer(header), ignored);
    asio::write(socket, asio::buffer(std::string_view("HTTP/1.1 400 Bad Request\r\n\r\n")), ignored);
    return std::make_pair(std::move(socket), std::string(header.data(), 2));
  });
  EXPECT_EQ(connect(a, b, &diagnostic), errc::authentication_failed) << diagnostic;
  EXPECT_NE(diagnostic.find("isn't encrypted with the key"), std::string::npos) << diagnostic;
  EXPECT_EQ(answering.get().second, "\x16\x03") << "TLS, not a hello";
}

TEST(Encryption, ClosingWithBytesInFlightEndsAllOfThem) {
  for (const bool by_peer : {true, false}) {
    RelayedPair pair(encrypted_pages, with_keys());
    pair.a.fill(1);
    const auto all = indexes(encrypted_pages);
    pair.relay.pause();
    std::vector<std::promise<std::error_code>> ended(4);
    for (auto& promise : ended) {
      pair.a.channel->async_batched_write(pair.a.pages(encrypted_pages), {.peer_id = "b", .remote_indexes = all},
                                          [&promise](std::error_code ec, std::size_t) { promise.set_value(ec); });
    }
    if (by_peer) {
      pair.b->channel->close();
      pair.relay.resume();
    } else {
      pair.a.channel->close();
    }
    for (auto& promise : ended) {
      EXPECT_TRUE(promise.get_future().get());
    }
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
