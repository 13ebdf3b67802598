// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <asio/buffer.hpp>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/kit/refusals.hpp>
#include <kvferry/url.hpp>

#include "common/open_descriptors.hpp"
#include "core/handshake_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace test;

class HandshakeGateTest : public HandshakeFixture {
 protected:
  asio::ip::tcp::socket stranger(const HandshakeService& service) {
    asio::ip::tcp::socket socket(io_);
    socket.connect({asio::ip::address_v4::loopback(), parse_url(service.bound_url()).port});
    return socket;
  }

  /// A service that tells what it turns away.
  HandshakeService::Options telling() {
    auto options = listening();
    options.refusals = refusals_;
    return options;
  }

  asio::io_context io_;
  std::vector<std::string> records_;
  std::mutex records_mutex_;
  std::shared_ptr<kit::Refusals> refusals_ =
      std::make_shared<kit::Refusals>(std::make_shared<kit::Logger>([this](const LogRecord& record) {
        const std::lock_guard lock(records_mutex_);
        records_.push_back(to_string(record));
      }));
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
  rlimit descriptors{};
  ::getrlimit(RLIMIT_NOFILE, &descriptors);
  rlimit few = descriptors;
  few.rlim_cur = 600;  // how many connections there may be goes by that
  ::setrlimit(RLIMIT_NOFILE, &few);
  const HandshakeService service(telling(), handler());
  ::setrlimit(RLIMIT_NOFILE, &descriptors);
  const auto begun = std::chrono::steady_clock::now();
  std::vector<asio::ip::tcp::socket> silent;
  for (int i = 0; i < 400; ++i) {
    silent.push_back(stranger(service));
  }
  expect_serving(service);
  std::array<char, 64> nothing;
  asio::error_code ec;
  EXPECT_EQ(silent.front().read_some(asio::buffer(nothing), ec), 0U);
  EXPECT_TRUE(ec == asio::error::eof || ec == asio::error::connection_reset) << ec.message();

  std::uint64_t made_room = 0;
  for (const auto& [cause, count] : refusals_->snapshot()) {
    made_room += cause == errc::resource_limit ? count : 0;
  }
  EXPECT_GT(made_room, 10U);
  const std::lock_guard lock(records_mutex_);
  const auto logged = std::ranges::count_if(records_, [](const std::string& record) {
    return record.find("warning stranger_refused peer \"127.0.0.1\"") != std::string::npos;
  });
  EXPECT_GE(logged, 10);
  // A busy machine may take more than the first ten seconds.
  EXPECT_LE(logged, 10 * (1 + (std::chrono::steady_clock::now() - begun) / std::chrono::seconds(10)))
      << "no more of them in ten seconds";
}

TEST_F(HandshakeGateTest, WhatIsNoZeroMqIsCountedAndLogged) {
  const HandshakeService service(telling(), handler());
  auto socket = stranger(service);
  asio::write(socket, asio::buffer(std::string("GET / HTTP/1.1\r\n\r\n")));
  std::array<char, 64> nothing;
  asio::error_code ec;
  EXPECT_EQ(socket.read_some(asio::buffer(nothing), ec), 0U);
  // Nor is this a side message.
  auto peer = connected(zmq::socket_type::req, service);
  EXPECT_EQ(decode_side_message<SideMessageError>(peer.exchange(Bytes(10))).code,
            static_cast<std::int64_t>(errc::malformed_message));

  std::vector<std::error_code> causes;
  for (const auto& [cause, count] : refusals_->snapshot()) {
    causes.push_back(cause);
    EXPECT_EQ(count, 1U);
  }
  std::vector<std::error_code> expected{errc::protocol_violation, errc::malformed_message};
  std::ranges::sort(expected);
  EXPECT_EQ(causes, expected);
  const std::lock_guard lock(records_mutex_);
  ASSERT_EQ(records_.size(), 2U);
  EXPECT_NE(records_.front().find("info stranger_refused"), std::string::npos) << records_.front();
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

TEST_F(HandshakeGateTest, ItsListenQueueIsAsLongAsTheSystemAllows) {
  const HandshakeService service(listening(), handler());
  const std::uint16_t port = parse_url(service.bound_url()).port;
  int allowed = 0;
  std::ifstream("/proc/sys/net/core/somaxconn") >> allowed;
  std::size_t found = 0;
  for (const auto& [descriptor, what] : kvferry_test::open_descriptors()) {
    sockaddr_in at{};
    socklen_t size = sizeof(at);
    int listens = 0;
    socklen_t flag_size = sizeof(listens);
    if (::getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &flag_size) != 0 || listens == 0 ||
        ::getsockname(descriptor, reinterpret_cast<sockaddr*>(&at), &size) != 0 || ntohs(at.sin_port) != port) {
      continue;
    }
    ++found;
    tcp_info info{};
    socklen_t info_size = sizeof(info);
    ASSERT_EQ(::getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &info_size), 0);
    EXPECT_EQ(info.tcpi_sacked, static_cast<std::uint32_t>(allowed));  // of a listening socket: the queue's length
  }
  EXPECT_EQ(found, 1U);
}

}  // namespace
}  // namespace kvferry
