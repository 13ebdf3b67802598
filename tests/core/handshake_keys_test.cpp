// SPDX-License-Identifier: Apache-2.0
// The requests that a listener with keys answers.
#include <gtest/gtest.h>
#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>
#include <zmq.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>

#include "common/zmtp.hpp"
#include "core/handshake_fixture.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI::test {
namespace {

class HandshakeKeys : public HandshakeFixture {};

TEST_F(HandshakeKeys, AKeyThatIsTakenAwayIsNoGoodForAnOpenConnectionEither) {
  const KeyPair server_key = make_key_pair();
  const KeyPair client_key = make_key_pair();
  const auto keyring = std::make_shared<Keyring>(server_key, std::vector<PeerKey>{{"client", client_key.public_key}});
  auto options = listening();
  options.keyring = keyring;
  HandshakeService service(options, handler());
  PeerSocket client(context_, zmq::socket_type::req);
  client.set(zmq::sockopt::curve_publickey, client_key.public_key);
  client.set(zmq::sockopt::curve_secretkey, client_key.secret_key.text());
  client.set(zmq::sockopt::curve_serverkey, server_key.public_key);
  client.connect(service.bound_url());
  EXPECT_EQ(client.exchange(echo(1).encoded()), echo(1));

  keyring->replace_peers({});
  const SideMessage refusal = client.exchange(echo(2).encoded());
  ASSERT_TRUE(refusal.is<SideMessageError>()) << refusal.type();

  keyring->replace_peers({{"client", client_key.public_key}});
  EXPECT_EQ(client.exchange(echo(3).encoded()), echo(3));
}

TEST_F(HandshakeKeys, AServerWithoutRoomIsNotTakenForOneWithAnotherKey) {
  asio::io_context io;
  asio::ip::tcp::acceptor acceptor(io, {asio::ip::address_v4::loopback(), 0});
  const std::string url = "tcp://127.0.0.1:" + std::to_string(acceptor.local_endpoint().port());
  std::string said("\xFF\0\0\0\0\0\0\0\1\x7F\3\1CURVE", 17);
  said.resize(zmtp_greeting_bytes);
  said += std::string("\4\n\5ERROR\003300", 12);
  std::atomic<std::size_t> asked = 0;
  std::function<void()> accept = [&] {
    acceptor.async_accept([&](std::error_code ec, asio::ip::tcp::socket socket) {
      if (!ec) {
        ++asked;
        std::error_code ignored;
        asio::write(socket, asio::buffer(said), ignored);
        accept();
      }
    });
  };
  accept();
  std::thread server([&] { io.run(); });
  auto options = listening();
  options.keyring =
      std::make_shared<Keyring>(make_key_pair(), std::vector<PeerKey>{{"server", make_key_pair().public_key}});
  HandshakeService client(options, handler());
  // On a busy machine two seconds may be over before it has been asked again.
  for (std::chrono::seconds timeout(2); asked <= 1 && timeout < patience; timeout *= 3) {
    asked = 0;
    EXPECT_EQ(get(ask(client, url, echo(1), timeout)).ec, errc::timed_out);
  }
  io.stop();
  server.join();
  EXPECT_GT(asked, 1U) << "it was asked again";
}

}  // namespace
}  // namespace kvferry::test
