// SPDX-License-Identifier: Apache-2.0
// Data connections with certificates, and somebody in between.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <openssl/ssl.h>

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp/hello.hpp>

#include "certified.hpp"
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// Passes on what either side says, until one ends.
class Splice {
 public:
  Splice(asio::ip::tcp::socket client, asio::ip::tcp::socket server) : ends_{std::move(client), std::move(server)} {
    for (const std::size_t from : {0U, 1U}) {
      threads_[from] = std::thread([this, from] {
        std::array<char, 4096> buffer{};
        std::error_code ec;
        while (!ec) {
          const std::size_t count = ends_[from].read_some(asio::buffer(buffer), ec);
          if (!ec) {
            asio::write(ends_[1 - from], asio::buffer(buffer, count), ec);
          }
        }
        end();
      });
    }
  }
  ~Splice() {
    end();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }
  Splice(const Splice&) = delete;
  Splice& operator=(const Splice&) = delete;

 private:
  void end() {
    for (auto& socket : ends_) {
      ::shutdown(socket.native_handle(), SHUT_RDWR);
    }
  }

  std::array<asio::ip::tcp::socket, 2> ends_;
  std::array<std::thread, 2> threads_;
};

/// Has a certificate of the CA's, and repeats the name of a handshake that it has seen in the clear on the way.
class Eavesdropper {
 public:
  /// @param opening the first message of an honest connection of the handshake.
  Eavesdropper(asio::ip::tcp::socket socket, const Identity& shown, const std::vector<unsigned char>& opening)
      : socket_(std::move(socket)) {
    constexpr std::array<unsigned char, 4> extension{0xff, 0x4b, 0, 16};
    // Not std::ranges::search, whose result Clang 14 can't use.
    const auto found = std::search(opening.begin(), opening.end(), extension.begin(), extension.end());
    EXPECT_LE(extension.size() + identity_.size(), static_cast<std::size_t>(opening.end() - found));
    if (!::testing::Test::HasFailure()) {
      std::memcpy(identity_.data(), &*found + extension.size(), identity_.size());
    }
    SSL_CTX_use_certificate(context_.get(), shown.certificate.get());
    SSL_CTX_use_PrivateKey(context_.get(), shown.key.get());
    kvferry::testing::name_handshake(context_.get(), identity_);
    ssl_.reset(SSL_new(context_.get()));
    SSL_set_fd(ssl_.get(), socket_.native_handle());
  }

  [[nodiscard]] SSL* ssl() const { return ssl_.get(); }
  [[nodiscard]] asio::ip::tcp::socket& socket() { return socket_; }

 private:
  asio::ip::tcp::socket socket_;
  std::array<std::byte, 16> identity_{};
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_{SSL_CTX_new(TLS_client_method()), &SSL_CTX_free};
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_{nullptr, &SSL_free};
};

/// Stands in the way of data connections to b.
class CertifiedInBetween : public Certified {
 protected:
  CertifiedInBetween() {
    TcpOptions options = with(b_files_, &b_log_);
    options.advertised_data_address = "127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port());
    options.hello_timeout = std::chrono::hours(1);  // it is no help here
    b_.emplace(certified_pages, std::move(options));
  }

  [[nodiscard]] asio::ip::tcp::socket accepted() {
    pollfd waiting{acceptor_.native_handle(), POLLIN, 0};
    EXPECT_EQ(::poll(&waiting, 1, static_cast<int>(milliseconds(long_enough).count())), 1);
    return acceptor_.accept();
  }
  [[nodiscard]] asio::ip::tcp::socket to_b() {
    asio::ip::tcp::socket socket(context_);
    socket.connect({asio::ip::address_v4::loopback(), b_->channel->data_port()});
    return socket;
  }

  /// The first message on a connection.
  static std::vector<unsigned char> opening_of(asio::ip::tcp::socket& client) {
    std::vector<unsigned char> opening(5);
    asio::read(client, asio::buffer(opening));
    opening.resize(5 + static_cast<std::size_t>(opening[3] << 8) + opening[4]);
    asio::read(client, asio::buffer(opening.data() + 5, opening.size() - 5));
    return opening;
  }

  asio::io_context context_;
  asio::ip::tcp::acceptor acceptor_{context_, {asio::ip::address_v4::loopback(), 0}};
  std::optional<Node> b_;
};

TEST_F(CertifiedInBetween, WhatTheHandshakeToldIsShownThoughFilesHaveBeenReplacedSince) {
  Node a(certified_pages, with(a_files_, &a_log_), false);
  auto connecting = std::async(std::launch::async, [&] {
    std::string diagnostic;
    const auto ec = connect(a, *b_, &diagnostic);
    return std::pair(ec, diagnostic);
  });
  auto client = accepted();  // so the handshake is over
  const Identity new_ca = authority("new ca");
  const Identity new_a = issue({.name = "a", .by = &new_ca});
  const Identity new_b = issue({.name = "b", .by = &new_ca});
  a_files_.set(new_a, new_ca);
  b_files_.set(new_b, new_ca);
  // Both sides take them up for other handshakes.
  Node other(certified_pages, with(a_files_));
  std::error_code ec;
  (void)a.channel->lazy_init_peer_connection("a", "other", other.channel->peer_init_url(), std::nullopt, {}, ec);
  EXPECT_FALSE(ec) << ec.message();
  (void)b_->channel->lazy_init_peer_connection("b", "other", other.channel->peer_init_url(), std::nullopt, {}, ec);
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_EQ(a_log_.count("certificates_replaced", new_a.sha256()), 1U);
  EXPECT_EQ(b_log_.count("certificates_replaced", new_b.sha256()), 1U);
  // The dialing side has to come again, for one handshake still.
  std::error_code ignored;
  client.set_option(asio::socket_base::linger(true, 0), ignored);
  client.close(ignored);
  const Splice splice(accepted(), to_b());
  const auto [ended, diagnostic] = connecting.get();
  EXPECT_FALSE(ended) << diagnostic;
  expect_pages_move(a, *b_);
}

TEST_F(CertifiedInBetween, WhoNamesNoHandshakeHearsNothing) {
  const auto heard_for = [this](std::string_view said) {
    auto socket = to_b();
    std::error_code ec;
    asio::write(socket, asio::buffer(said), ec);
    std::string heard;
    std::array<char, 4096> buffer{};
    for (ec.clear(); !ec;) {
      heard.append(buffer.data(), socket.read_some(asio::buffer(buffer), ec));
    }
    return heard;
  };
  const Hello hello;  // of a plain dialer's
  EXPECT_EQ(heard_for({reinterpret_cast<const char*>(&hello), sizeof(hello)}), "");
  EXPECT_EQ(heard_for("GET / HTTP/1.1\r\n\r\n"), "");
  // One with a certificate of the CA's that knows of no handshake.
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free);
  SSL_CTX_use_certificate(context.get(), a_own_.certificate.get());
  SSL_CTX_use_PrivateKey(context.get(), a_own_.key.get());
  const std::unique_ptr<SSL, decltype(&SSL_free)> ssl(SSL_new(context.get()), &SSL_free);
  auto stranger = to_b();
  SSL_set_fd(ssl.get(), stranger.native_handle());
  EXPECT_NE(SSL_connect(ssl.get()), 1);
  EXPECT_EQ(SSL_get0_peer_certificate(ssl.get()), nullptr);
  EXPECT_EQ(BIO_number_read(SSL_get_rbio(ssl.get())), 0U);
  stranger.close();
  EXPECT_TRUE(b_log_.wait_for("stranger_refused", "a data connection is of no handshake, or not with certificates"));
  EXPECT_EQ(b_->channel->stats().handshakes.accepted, 0U);
}

TEST_F(CertifiedInBetween, ACertificateOfTheCaThatNobodyToldOfIsRefused) {
  Node a(certified_pages, with(a_files_), false);
  auto connecting = std::async(std::launch::async, [&] { return connect(a, *b_); });
  auto client = accepted();
  const auto opening = opening_of(client);
  const Identity untold = issue({.name = "a", .by = &ca_});
  Eavesdropper eavesdropper(to_b(), untold, opening);
  EXPECT_EQ(SSL_connect(eavesdropper.ssl()), 1) << "it is through before the other side has looked at its certificate";
  std::array<char, 100> buffer{};
  EXPECT_LE(SSL_read(eavesdropper.ssl(), buffer.data(), buffer.size()), 0);
  eavesdropper.socket().close();
  EXPECT_TRUE(b_log_.wait_for("stranger_refused",
                              "a data connection of peer 'a': it shows a certificate with SHA-256 " + untold.sha256() +
                                  ", and has told of one with SHA-256 " + a_own_.sha256()))
      << b_log_.all();

  // The honest one isn't disturbed.
  auto server = to_b();
  asio::write(server, asio::buffer(opening));
  const Splice splice(std::move(client), std::move(server));
  EXPECT_FALSE(connecting.get());
  expect_pages_move(a, *b_);
}

TEST_F(CertifiedInBetween, WhoIsRefusedAndGoesOnAndOnKeepsNobodyFromHisWork) {
  Node friendly(certified_pages, with(a_files_), false);
  auto greeting = std::async(std::launch::async, [&] { return connect(friendly, *b_, nullptr, "friendly"); });
  auto friends = accepted();
  const Splice friendly_splice(std::move(friends), to_b());
  ASSERT_FALSE(greeting.get());

  Node a(certified_pages, with(a_files_), false);
  auto connecting = std::async(std::launch::async, [&] { return connect(a, *b_); });
  auto client = accepted();
  const auto opening = opening_of(client);
  Eavesdropper eavesdropper(to_b(), issue({.name = "a", .by = &ca_}), opening);
  ASSERT_EQ(SSL_connect(eavesdropper.ssl()), 1);
  std::promise<std::size_t> over;
  std::thread flood([&] {
    // Far more than what is read of it and what lies in sockets' buffers. Each piece is larger than what is read at a time, so
    // that there is always more.
    constexpr std::size_t most = std::size_t{256} << 20;
    const std::vector<char> nonsense(std::size_t{1} << 18);
    std::size_t sent = 0;
    for (ssize_t part = 1; part > 0 && sent < most;) {
      part = ::send(eavesdropper.socket().native_handle(), nonsense.data(), nonsense.size(), MSG_NOSIGNAL);
      sent += static_cast<std::size_t>(std::max<ssize_t>(part, 0));
    }
    eavesdropper.socket().close();
    over.set_value(sent);
  });
  EXPECT_LT(over.get_future().get(), std::size_t{64} << 20) << "it is listened to for as long as it likes";
  flood.join();
  expect_pages_move(friendly, *b_);
  auto server = to_b();
  asio::write(server, asio::buffer(opening));
  const Splice splice(std::move(client), std::move(server));
  EXPECT_FALSE(connecting.get());
  expect_pages_move(a, *b_, 2);
}

}  // namespace
}  // namespace kvferry::tcp::testing
