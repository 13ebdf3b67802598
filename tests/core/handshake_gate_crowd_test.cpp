// SPDX-License-Identifier: Apache-2.0
//
// The gate alone in front of a ROUTER of the test's, and more connections than ZeroMQ gets done with.
#include <gtest/gtest.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <list>
#include <optional>
#include <stdexcept>
#include <string>

#include <zmq.hpp>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/handshake/handshake_gate.hpp>

#include "common/patience.hpp"
#include "common/zmtp.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using kit::HandshakeGate;
using Clock = HandshakeGate::Clock;

constexpr std::size_t callers = 100;

/// Begins ZeroMQ's greeting, and stops there.
class Caller {
 public:
  explicit Caller(std::uint16_t port) : socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in gate{};
    gate.sin_family = AF_INET;
    gate.sin_port = htons(port);
    ::inet_pton(AF_INET, "127.0.0.1", &gate.sin_addr);
    const std::string signature = test::zmtp_hello().substr(0, 10);
    if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&gate), sizeof(gate)) != 0 ||
        ::send(socket_.get(), signature.data(), signature.size(), MSG_NOSIGNAL) != 10) {
      throw std::runtime_error("no connection");
    }
  }

  void hang_up() const { ::shutdown(socket_.get(), SHUT_WR); }
  /// Returns when the kernel of the other side knows that this one has hung up.
  void wait_until_known() const {
    tcp_info info{};
    for (const auto until = Clock::now() + kvferry_test::long_enough; info.tcpi_state != TCP_FIN_WAIT2;) {
      socklen_t size = sizeof(info);
      if (::getsockopt(socket_.get(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0 || Clock::now() > until) {
        throw std::runtime_error("the end of a connection is not acknowledged");
      }
    }
  }
  [[nodiscard]] bool hears_something() const {
    pollfd waits{socket_.get(), POLLIN, 0};
    return ::poll(&waits, 1, 0) == 1;
  }

 private:
  Descriptor socket_;
};

class HandshakeGateCrowd : public ::testing::Test {
 protected:
  HandshakeGateCrowd() {
    EXPECT_EQ(::zmq_socket_monitor(router_.handle(), "inproc://connected", ZMQ_EVENT_CONNECTED), 0);
    auto bounds = HandshakeGate::Bounds::of(std::size_t{1} << 16);
    bounds.patience = 4 * kvferry_test::long_enough;  // longer than a test waits
    bounds.connections = 4 * callers;
    gate_.emplace(router_, HostPort{"127.0.0.1", 0}, bounds);
  }

  /// ZeroMQ's thread waits within its first connection until somebody listens to it.
  void listen_to_zeromq() {
    monitor_.set(zmq::sockopt::rcvhwm, 0);
    monitor_.connect("inproc://connected");
  }
  /// Of which ZeroMQ has told since the last time.
  std::size_t connected_to_zeromq() {
    std::size_t count = 0;
    for (zmq::message_t frame; monitor_.recv(frame, zmq::recv_flags::dontwait);) {
      count += frame.more() ? std::size_t{1} : 0;
    }
    return count;
  }

  /// @throws if that takes too long.
  template <class Done>
  void serve_until(Done done) {
    pollfd waits{gate_->event_fd(), POLLIN, 0};
    for (const auto until = Clock::now() + kvferry_test::long_enough; !done();) {
      (void)::poll(&waits, 1, 5);
      gate_->serve();
      gate_->retire();
      if (Clock::now() > until) {
        throw std::runtime_error("the gate takes too long");
      }
    }
  }
  /// Until there is nothing to do for it.
  void serve_to_rest() {
    int rests = 0;  // in a row
    serve_until([&] {
      pollfd waits{gate_->event_fd(), POLLIN, 0};
      rests = ::poll(&waits, 1, 0) == 0 ? rests + 1 : 0;
      return rests > 20;
    });
  }

  /// This process's descriptors of connections to the gate's port.
  [[nodiscard]] std::size_t taken_in() const {
    std::size_t count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      const int descriptor = std::stoi(entry.path().filename());
      sockaddr_in own{};
      sockaddr_in other{};
      socklen_t own_size = sizeof(own);
      socklen_t other_size = sizeof(other);
      count += ::getsockname(descriptor, reinterpret_cast<sockaddr*>(&own), &own_size) == 0 &&
                       own.sin_family == AF_INET && ntohs(own.sin_port) == gate_->port() &&
                       ::getpeername(descriptor, reinterpret_cast<sockaddr*>(&other), &other_size) == 0
                   ? std::size_t{1}
                   : 0;
    }
    return count;
  }

  zmq::context_t context_;
  zmq::socket_t monitor_{context_, zmq::socket_type::pair};
  zmq::socket_t router_{context_, zmq::socket_type::router};
  std::optional<HandshakeGate> gate_;
  std::list<Caller> callers_;
};

TEST_F(HandshakeGateCrowd, WhoHangsUpInTheListenQueueCostsZeroMqNothing) {
  listen_to_zeromq();
  for (std::size_t i = 0; i < callers; ++i) {
    callers_.emplace_back(gate_->port()).hang_up();
  }
  std::ranges::for_each(callers_, &Caller::wait_until_known);
  const Caller& newcomer = callers_.emplace_back(gate_->port());
  serve_until([&] { return newcomer.hears_something(); });
  EXPECT_EQ(taken_in(), 1U);
  EXPECT_EQ(connected_to_zeromq(), 1U);
}

TEST_F(HandshakeGateCrowd, WaitsOutsideWhileZeroMqIsBehind) {
  for (std::size_t i = 0; i < callers; ++i) {
    callers_.emplace_back(gate_->port());
  }
  serve_to_rest();
  EXPECT_GE(taken_in(), 1U);
  EXPECT_LE(taken_in(), callers / 2);
  listen_to_zeromq();
  serve_until([&] { return std::ranges::all_of(callers_, &Caller::hears_something); });
  EXPECT_EQ(taken_in(), callers);
}

TEST_F(HandshakeGateCrowd, WhoHangsUpWhileItWaitsOutsideIsLetGo) {
  for (std::size_t i = 0; i < callers; ++i) {
    callers_.emplace_back(gate_->port());
  }
  serve_to_rest();
  const auto first_to_go = std::next(callers_.begin(), static_cast<std::ptrdiff_t>(callers / 2));
  std::for_each(first_to_go, callers_.end(), [](const Caller& caller) { caller.hang_up(); });
  std::for_each(first_to_go, callers_.end(), [](const Caller& caller) { caller.wait_until_known(); });
  serve_until([&] {
    gate_->expire(Clock::now());
    return std::all_of(first_to_go, callers_.end(), [](const Caller& caller) { return caller.hears_something(); });
  });
  EXPECT_LE(taken_in(), callers / 2) << "ZeroMQ is still behind";
  // What ZeroMQ has to tell when its socket is closed is leaked.
  listen_to_zeromq();
  serve_until([&] {
    return std::all_of(callers_.begin(), first_to_go, [](const Caller& caller) { return caller.hears_something(); });
  });
}

}  // namespace
}  // namespace kvferry
