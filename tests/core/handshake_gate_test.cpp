// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <asio/buffer.hpp>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <array>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/url.hpp>

#include "core/handshake_fixture.hpp"

namespace kvferry {
namespace {

using namespace test;

class HandshakeGateTest : public HandshakeFixture {
 protected:
  asio::ip::tcp::socket stranger(const HandshakeService& service) {
    asio::ip::tcp::socket socket(io_);
    socket.connect({asio::ip::address_v4::loopback(), parse_url(service.bound_url()).port});
    return socket;
  }

  asio::io_context io_;
};

TEST_F(HandshakeGateTest, WhatIsTooLargeButNotByFarIsAnsweredWithBothSizes) {
  auto options = listening();
  options.max_message_bytes = 1000;
  const HandshakeService service(options, handler());
  auto peer = connected(zmq::socket_type::req, service);
  const auto error = decode_side_message<SideMessageError>(peer.exchange(Bytes(1500)));
  EXPECT_NE(error.message.find("1500 bytes, at most 1000"), std::string::npos) << error.message;
}

TEST_F(HandshakeGateTest, WhatAPeerCallsItselfTakesNobodysAnswers) {
  const HandshakeService service(listening(), handler());
  await_held(2);
  std::vector<PeerSocket> peers;
  for (const std::uint64_t number : {std::uint64_t{1}, std::uint64_t{2}}) {
    peers.emplace_back(context_, zmq::socket_type::dealer).set(zmq::sockopt::routing_id, "one name");
    peers.back().connect(service.bound_url());
    peers.back().send_frames({{}, encode_side_message(Hold{number}).encoded()});
  }
  for (auto& reply : held_replies()) {
    EXPECT_EQ(reply.source(), "127.0.0.1");
    reply(echo(5));
  }
  for (auto& peer : peers) {
    EXPECT_EQ(peer.receive_message(), echo(5));
  }
}

TEST_F(HandshakeGateTest, ConnectionsThatSayNothingGiveWay) {
  const HandshakeService service(listening(), handler());
  std::vector<asio::ip::tcp::socket> silent;
  for (int i = 0; i < 400; ++i) {
    silent.push_back(stranger(service));
  }
  expect_serving(service);
  std::array<char, 64> nothing;
  asio::error_code ec;
  EXPECT_EQ(silent.front().read_some(asio::buffer(nothing), ec), 0U);
  EXPECT_TRUE(ec == asio::error::eof || ec == asio::error::connection_reset) << ec.message();
}

TEST_F(HandshakeGateTest, AMessageWithoutEndIsNotStored) {
  const HandshakeService service(listening(), handler());
  PeerSocket peer(context_, zmq::socket_type::dealer);
  ASSERT_EQ(zmq_socket_monitor(peer.handle(), "inproc://peer", ZMQ_EVENT_DISCONNECTED), 0);
  PeerSocket events(context_, zmq::socket_type::pair);
  events.connect("inproc://peer");
  peer.connect(service.bound_url());
  const std::vector<std::byte> part(std::size_t{64} << 10);
  for (int i = 0; i < 64; ++i) {
    peer.send(zmq::buffer(part.data(), part.size()), zmq::send_flags::sndmore);
  }
  EXPECT_EQ(events.receive_frames().size(), 2U) << "the event, and the address";
  expect_serving(service);
}

TEST_F(HandshakeGateTest, RequestsThatComeInARowAreAllAnswered) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::dealer, service);
  constexpr std::uint64_t many = 1000;
  std::thread sender([&] {
    for (std::uint64_t i = 0; i < many; ++i) {
      auto other = connected(zmq::socket_type::req, service);
      EXPECT_EQ(other.exchange(echo(i).encoded()), echo(i));
    }
  });
  for (std::uint64_t i = 0; i < many; ++i) {
    peer.send_frames({{}, echo(i).encoded()});
    if (i >= 10) {
      EXPECT_EQ(peer.receive_message(), echo(i - 10));
    }
  }
  sender.join();
}

}  // namespace
}  // namespace kvferry
