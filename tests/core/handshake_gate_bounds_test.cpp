// SPDX-License-Identifier: Apache-2.0
//
// The gate alone in front of a ROUTER of the test's: peers that don't read their answers.
#include <gtest/gtest.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <functional>
#include <future>
#include <list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/handshake/handshake_gate.hpp>

#include "common/zmtp.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using kit::HandshakeGate;
using Clock = HandshakeGate::Clock;

constexpr std::chrono::seconds patience{60};

/// A connection to the gate from an address of the loopback network.
class Reader {
 public:
  Reader(std::uint16_t port, const char* from) : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    constexpr int small = 2304;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    const timeval limit{patience.count(), 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    const sockaddr_in own = address(from, 0);
    const sockaddr_in gate = address("127.0.0.1", port);
    if (::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&own), sizeof(own)) != 0 ||
        ::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&gate), sizeof(gate)) != 0) {
      throw std::runtime_error("no connection");
    }
  }

  /// Greets and asks. Blocks until the other side has greeted.
  [[nodiscard]] bool ask() const {
    const std::string request = test::zmtp_request(std::array<std::byte, 1>{});
    return test::zmtp_greet(socket_.get()) &&
           ::send(socket_.get(), request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size());
  }
  [[nodiscard]] bool has_something_to_read() const {
    pollfd waits{socket_.get(), POLLIN, 0};
    return ::poll(&waits, 1, 0) == 1;
  }
  /// Reads to the connection's end. @return how much came; nothing if it has no end.
  [[nodiscard]] std::optional<std::size_t> read_all() const {
    std::vector<char> buffer(std::size_t{1} << 16);
    std::size_t all = 0;
    for (;;) {
      const ssize_t count = ::recv(socket_.get(), buffer.data(), buffer.size(), 0);
      if (count <= 0) {
        return count == 0 || errno == ECONNRESET ? std::optional(all) : std::nullopt;
      }
      all += static_cast<std::size_t>(count);
    }
  }

 private:
  static sockaddr_in address(const char* host, std::uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    ::inet_pton(AF_INET, host, &address.sin_addr);
    return address;
  }

  Descriptor socket_;
};

class HandshakeGateBounds : public ::testing::Test {
 protected:
  void open(const HandshakeGate::Bounds& bounds) { gate_.emplace(router_, HostPort{"127.0.0.1", 0}, bounds); }

  static HandshakeGate::Bounds bounds(std::size_t unread, std::size_t of_source, std::size_t total) {
    auto bounds = HandshakeGate::Bounds::of(std::size_t{1} << 16);
    bounds.unread_bytes = unread;
    bounds.source_unread_bytes = of_source;
    bounds.total_unread_bytes = total;
    bounds.patience = patience;
    return bounds;
  }

  /// Serves until `done`. @throws if that takes too long.
  template <class Done>
  void serve_until(Done done) {
    const auto until = Clock::now() + patience;
    pollfd waits{gate_->event_fd(), POLLIN, 0};
    while (!done()) {
      (void)::poll(&waits, 1, 5);
      gate_->serve();
      gate_->retire();
      if (Clock::now() > until) {
        throw std::runtime_error("the gate takes too long");
      }
    }
  }

  /// @return what the gate calls the connection.
  std::string asked(const Reader& peer) {
    const auto name = asked_unless(peer, [] { return false; });
    EXPECT_TRUE(name);
    return name.value_or(std::string());
  }
  /// @param gone whether the request is not to be waited for any longer. @return what the gate calls the connection; nothing
  /// where it is gone.
  template <class Gone>
  std::optional<std::string> asked_unless(const Reader& peer, Gone gone) {
    auto asking = std::async(std::launch::async, [&] { return peer.ask(); });
    std::vector<zmq::message_t> frames;
    bool came = false;
    serve_until([&] {
      for (zmq::message_t frame; !came && router_.recv(frame, zmq::recv_flags::dontwait);) {
        came = !frame.more();
        frames.push_back(std::move(frame));
      }
      return came || gone();
    });
    serve_until([&] { return asking.wait_for(std::chrono::seconds(0)) == std::future_status::ready; });
    const bool has_said = asking.get();
    if (!came) {
      return std::nullopt;
    }
    EXPECT_TRUE(has_said);
    const std::string name = frames.front().to_string();
    const std::string source = gate_->request_taken(name, frames.size(), frames.back().size());
    if (source.empty()) {
      return std::nullopt;
    }
    EXPECT_EQ(source.substr(0, 4), "127.");
    return name;
  }

  zmq::context_t context_;
  zmq::socket_t router_{context_, zmq::socket_type::router};
  std::optional<HandshakeGate> gate_;
};

TEST_F(HandshakeGateBounds, AConnectionThatDoesNotReadItsAnswersIsClosed) {
  open(bounds(100, 1000, 1000));
  const Reader peer(gate_->port(), "127.0.0.1");
  const std::string name = asked(peer);
  EXPECT_TRUE(gate_->request_answered(name, 100));
  EXPECT_FALSE(gate_->request_answered(name, 1));
  EXPECT_EQ(peer.read_all(), 0U);
}

TEST_F(HandshakeGateBounds, OfASourceTheOneThatHasMostUnreadHasToGo) {
  open(bounds(100, 150, 1000));
  const Reader greedy(gate_->port(), "127.0.0.1");
  const Reader modest(gate_->port(), "127.0.0.1");
  const Reader other(gate_->port(), "127.0.0.2");
  const std::string greedy_name = asked(greedy);
  const std::string modest_name = asked(modest);
  const std::string other_name = asked(other);
  EXPECT_TRUE(gate_->request_answered(other_name, 100));
  EXPECT_TRUE(gate_->request_answered(greedy_name, 90));
  EXPECT_TRUE(gate_->request_answered(modest_name, 60)) << "that is all that the address may have";
  EXPECT_TRUE(gate_->request_answered(modest_name, 1));
  EXPECT_EQ(greedy.read_all(), 0U);
  EXPECT_FALSE(gate_->request_answered(greedy_name, 0));
  EXPECT_TRUE(gate_->request_answered(modest_name, 0));
  EXPECT_TRUE(gate_->request_answered(other_name, 0)) << "of another address";
}

TEST_F(HandshakeGateBounds, OfAllTheOneThatHasMostUnreadHasToGo) {
  open(bounds(100, 150, 200));
  const Reader greedy(gate_->port(), "127.0.0.1");
  const Reader second(gate_->port(), "127.0.0.2");
  const Reader third(gate_->port(), "127.0.0.3");
  const std::string greedy_name = asked(greedy);
  const std::string second_name = asked(second);
  const std::string third_name = asked(third);
  EXPECT_TRUE(gate_->request_answered(greedy_name, 90));
  EXPECT_TRUE(gate_->request_answered(second_name, 80));
  EXPECT_TRUE(gate_->request_answered(third_name, 30)) << "that is all there may be";
  EXPECT_TRUE(gate_->request_answered(third_name, 1));
  EXPECT_EQ(greedy.read_all(), 0U);
  EXPECT_FALSE(gate_->request_answered(greedy_name, 0));
  EXPECT_TRUE(gate_->request_answered(second_name, 0));
}

// Its last words wait for the peer to take those before. That ZeroMQ has hung up meanwhile is nothing to do.
TEST_F(HandshakeGateBounds, WhoFindsNoRoomIsToldSoWhereKeysMightBeThoughtWrong) {
  for (const bool with_keys : {false, true}) {
    auto few = HandshakeGate::Bounds::of(std::size_t{1} << 16);
    few.connections = 4;  // of which one address may have three
    few.greets_first = with_keys;
    few.patience = patience;
    open(few);
    std::list<Reader> readers;
    const auto told = [&] { return std::ranges::find_if(readers, &Reader::has_something_to_read); };
    serve_until([&] {
      if (readers.size() < 16) {
        readers.emplace_back(gate_->port(), "127.0.0.1");
      }
      return told() != readers.end();
    });
    EXPECT_EQ(told()->read_all(), with_keys ? 64U + 12U : 0U);
    readers.clear();
    gate_.reset();
  }
}

TEST_F(HandshakeGateBounds, RestsWhereZeroMqHasHungUpAndThePeerDoesNotRead) {
  constexpr std::size_t more_than_sockets_hold = std::size_t{32} << 20;
  // ZeroMQ hangs up so long after its first question whether the peer lives, which this one doesn't answer. On a busy machine that
  // may be before it has got much of the answer, or even the request.
  std::size_t read = 0;
  for (int hangs_up_after = 1000; read <= std::size_t{64} << 10; hangs_up_after *= 5) {
    ASSERT_LE(hangs_up_after, 25'000) << "of the answer came " << read << " bytes";
    router_ = zmq::socket_t(context_, zmq::socket_type::router);
    router_.set(zmq::sockopt::heartbeat_ivl, 100);
    router_.set(zmq::sockopt::heartbeat_timeout, hangs_up_after);
    const std::string address = "inproc://monitor" + std::to_string(hangs_up_after);
    ASSERT_EQ(::zmq_socket_monitor(router_.handle(), address.c_str(), ZMQ_EVENT_DISCONNECTED), 0);
    zmq::socket_t monitor(context_, zmq::socket_type::pair);
    monitor.connect(address);
    open(bounds(2 * more_than_sockets_hold, 2 * more_than_sockets_hold, 2 * more_than_sockets_hold));
    zmq::message_t event;
    auto has_hung_up = [&, seen = false]() mutable {
      seen = seen || monitor.recv(event, zmq::recv_flags::dontwait).has_value();
      return seen;
    };
    const Reader peer(gate_->port(), "127.0.0.1");
    const auto name = asked_unless(peer, std::ref(has_hung_up));
    serve_until([&] { return peer.has_something_to_read(); });
    if (name && gate_->request_answered(*name, more_than_sockets_hold)) {
      router_.send(zmq::buffer(*name), zmq::send_flags::sndmore);
      router_.send(zmq::message_t(), zmq::send_flags::sndmore);
      router_.send(zmq::message_t(more_than_sockets_hold), zmq::send_flags::none);
      serve_until(std::ref(has_hung_up));

      int rests = 0;  // in a row, once it has passed on what the sockets take
      serve_until([&] {
        pollfd waits{gate_->event_fd(), POLLIN, 0};
        rests = ::poll(&waits, 1, 0) == 0 ? rests + 1 : 0;
        return rests > 50;
      });

      auto reading = std::async(std::launch::async, [&] { return peer.read_all(); });
      serve_until([&] { return reading.wait_for(std::chrono::seconds(0)) == std::future_status::ready; });
      const auto all = reading.get();
      ASSERT_TRUE(all) << "the connection ends when all has been taken";
      read = *all;
      EXPECT_LT(read, more_than_sockets_hold) << "ZeroMQ had more to say when it hung up";
    }
    gate_.reset();
    ::zmq_socket_monitor(router_.handle(), nullptr, 0);
  }
}

}  // namespace
}  // namespace kvferry
