// SPDX-License-Identifier: Apache-2.0
//
// Strangers at the handshake's port who know ZeroMQ's protocol and don't keep to it as ZeroMQ would.
#include <gtest/gtest.h>

#include <poll.h>
#include <sys/socket.h>

#include <asio/buffer.hpp>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <array>
#include <chrono>
#include <list>
#include <string>
#include <vector>

#include <kvferry/handshake/handshake_gate.hpp>
#include <kvferry/url.hpp>

#include "common/zmtp.hpp"
#include "core/handshake_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace test;

/// A connection that says what it is told to, and reads nothing unless it is asked to.
class Stranger {
 public:
  explicit Stranger(const HandshakeService& service, int receive_buffer = 0) : socket_(io_) {
    socket_.open(asio::ip::tcp::v4());
    if (receive_buffer != 0) {
      socket_.set_option(asio::socket_base::receive_buffer_size(receive_buffer));
    }
    socket_.connect({asio::ip::address_v4::loopback(), parse_url(service.bound_url()).port});
    EXPECT_TRUE(zmtp_greet(socket_.native_handle()));
  }

  /// As much of it as the service takes, and no more of it for so long. @return whether that was all.
  bool say(const std::string& bytes, std::chrono::milliseconds limit = std::chrono::milliseconds(300)) {
    std::size_t said = 0;
    pollfd room{socket_.native_handle(), POLLOUT, 0};
    while (said < bytes.size() && ::poll(&room, 1, static_cast<int>(limit.count())) == 1) {
      const auto sent = ::send(room.fd, bytes.data() + said, bytes.size() - said, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0 && errno != EAGAIN) {
        return false;
      }
      said += sent > 0 ? static_cast<std::size_t>(sent) : 0;
    }
    return said == bytes.size();
  }
  /// Asks, and reads no answer, until the service takes no more questions.
  void ask_without_end() {
    const std::array<std::byte, 1> nonsense{std::byte{0xC1}};
    std::string burst;
    for (int i = 0; i < 9'500; ++i) {
      burst += zmtp_request(nonsense);
    }
    while (say(burst)) {
    }
  }

  /// Reads until so many bytes have come. @return false if the connection ended before.
  [[nodiscard]] bool read(std::size_t bytes) {
    std::vector<char> buffer(bytes);
    asio::error_code ec;
    asio::read(socket_, asio::buffer(buffer), ec);
    return !ec;
  }
  /// Waits for the connection's end.
  void read_to_the_end() {
    std::array<char, 4096> buffer;
    asio::error_code ec;
    while (!ec) {
      socket_.read_some(asio::buffer(buffer), ec);
    }
  }

 private:
  asio::io_context io_;
  asio::ip::tcp::socket socket_;
};

class HandshakeGateStrangers : public HandshakeFixture {
 protected:
  /// As a channel does it: a busy machine's gate ends the connection of whoever couldn't ask in time, and he asks anew.
  void expect_to_get_in(const HandshakeService& service) {
    const auto until = std::chrono::steady_clock::now() + patience;
    do {
      auto peer = connected(zmq::socket_type::req, service);
      peer.set(zmq::sockopt::rcvtimeo, 4'000);
      peer.send_frames({echo(4711).encoded()});
      if (zmq::message_t answer; peer.recv(answer)) {
        const auto* data = static_cast<const std::byte*>(answer.data());
        EXPECT_EQ(parse_side_message(Bytes(data, data + answer.size())), echo(4711));
        return;
      }
    } while (std::chrono::steady_clock::now() < until);
    ADD_FAILURE() << "no answer in " << patience.count() << " s, however often it was asked for";
  }

  /// Many say the most of a request each, and then the rest. @return whether all get an answer.
  [[nodiscard]] bool are_answered_after_halves() {
    const HandshakeService service(listening(), handler());
    const std::string request = zmtp_request(std::vector<std::byte>(60'000, std::byte{0xC1}));
    std::list<Stranger> peers;
    for (int i = 0; i < 20; ++i) {
      peers.emplace_back(service);
    }
    const auto half = request.size() * 3 / 4;
    bool all = true;
    for (auto& peer : peers) {
      all = all && peer.say(request.substr(0, half), patience);
    }
    for (int i = 0; i < 10; ++i) {
      expect_serving(service);  // which takes a little of each in turn
    }
    for (auto& peer : peers) {
      all = all && peer.say(request.substr(half), patience);
    }
    for (auto& peer : peers) {
      all = all && peer.read(20);
    }
    return all;
  }
};

TEST_F(HandshakeGateStrangers, WhoReadsNoAnswersTakesNobodyElsesRoom) {
  const HandshakeService service(listening(), handler());
  std::list<Stranger> strangers;
  for (int i = 0; i < 12; ++i) {
    strangers.emplace_back(service, 2304);
    strangers.back().ask_without_end();
    expect_to_get_in(service);
  }
}

// Each of them has begun, and together they have used up what an address may have: the first one goes on all the same, and
// makes room for the next.
TEST_F(HandshakeGateStrangers, RequestsThatAreAllHalfDoneDoNotWaitForEachOther) {
  // On a busy machine the gate's patience with them may be over before the last one has said all.
  const auto patience_of_the_gate = kit::HandshakeGate::Bounds().patience;
  const auto until = std::chrono::steady_clock::now() + patience;
  for (bool all_are_answered = false; !all_are_answered;) {
    const auto begun = std::chrono::steady_clock::now();
    all_are_answered = are_answered_after_halves();
    if (!all_are_answered) {
      ASSERT_GE(std::chrono::steady_clock::now() - begun, patience_of_the_gate) << "they wait for each other";
      ASSERT_LT(std::chrono::steady_clock::now(), until) << "none of it was in time";
    }
  }
}

/// A peer whose request is answered only after longer than the gate has patience with those who are late.
class PatientPeer : public HandshakeFixture {
 protected:
  PatientPeer() : peer_(context_, zmq::socket_type::req), events_(context_, zmq::socket_type::pair) {}

  void expect_to_stay_connected() {
    ASSERT_EQ(zmq_socket_monitor(peer_.handle(), "inproc://peer", ZMQ_EVENT_DISCONNECTED), 0);
    events_.connect("inproc://peer");
    peer_.connect(service_.bound_url());
    peer_.send_frames({encode_side_message(Hold{1}).encoded()});
    auto reply = held_reply();
    // Of connections that a busy machine left no time to ask.
    for (zmq::message_t ended; events_.recv(ended, zmq::recv_flags::dontwait);) {
    }
    zmq_pollitem_t disconnected{events_.handle(), 0, ZMQ_POLLIN, 0};
    EXPECT_EQ(zmq_poll(&disconnected, 1, 4'000), 0);
    reply(echo(5));
    EXPECT_EQ(peer_.receive_message(), echo(5));
  }

  const HandshakeService service_{listening(), handler()};
  PeerSocket peer_;
  PeerSocket events_;
};

TEST_F(PatientPeer, StaysThoughItSendsHeartbeats) {
  peer_.set(zmq::sockopt::heartbeat_ivl, 20);
  peer_.set(zmq::sockopt::heartbeat_timeout, 60'000);  // the interval otherwise, in which a busy machine doesn't always answer
  expect_to_stay_connected();
}

TEST_F(PatientPeer, StaysThoughItHasALongName) {
  peer_.set(zmq::sockopt::routing_id, std::string(250, 'n'));
  expect_to_stay_connected();
}

TEST_F(HandshakeGateStrangers, ALaterRequestThatIsLeftHalfDoneEndsItsConnectionInTime) {
  const HandshakeService service(listening(), handler());
  Stranger stranger(service);
  stranger.say(zmtp_request(echo(1).encoded()));
  ASSERT_TRUE(stranger.read(10));
  const std::string request = zmtp_request(std::vector<std::byte>(60'000));
  const auto begun = std::chrono::steady_clock::now();
  stranger.say(request.substr(0, request.size() / 2));
  stranger.read_to_the_end();
  EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds(20)) << "and not when it has been idle for long";
}

}  // namespace
}  // namespace kvferry
