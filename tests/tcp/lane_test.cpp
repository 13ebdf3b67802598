// SPDX-License-Identifier: Apache-2.0
#include "tcp/lane.hpp"

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <barrier>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "protocol_harness.hpp"

namespace kvferry::tcp {
namespace {

using asio::ip::tcp;
using testing::Host;

/// A connected socket; the other end is closed with it.
struct Connection {
  explicit Connection(asio::io_context& context) : near(context), far(context) {
    tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), 0});
    near.connect(acceptor.local_endpoint());
    acceptor.accept(far);
  }
  tcp::socket near;
  tcp::socket far;
};

// Each of them holds the lane for a moment, while the other leaves its work to whoever holds it.
TEST(Lane, AnOperationThatMeetsTheEndOfItsLaneEndsToo) {
  constexpr int rounds = 2000;
  asio::io_context context;
  const auto host = std::make_shared<Host>(std::vector<MemoryRegion>{});
  const auto deadlines = std::make_shared<kit::DeadlineQueue>(context.get_executor());
  const auto registry = std::make_shared<kit::OperationRegistry>(deadlines, 16);
  const auto events = std::make_shared<SocketEvents>(context.get_executor());
  std::shared_ptr<Lane> lane;
  std::barrier turn(2);
  std::thread disconnecting([&] {
    for (int round = 0; round < rounds; ++round) {
      turn.arrive_and_wait();
      lane->disconnect();
      turn.arrive_and_wait();
    }
  });
  int ended = 0;
  for (int round = 0; round < rounds; ++round) {
    Connection connection(context);
    lane = std::make_shared<Lane>(std::move(connection.near), host, Lane::Options{std::chrono::seconds(1), events, {}},
                                  std::weak_ptr<Lane::Owner>());
    lane->run({});
    lane->shut(errc::closed, "the test ends it");
    std::vector<std::byte> object(64);
    TransferRequest request;
    request.kind = TransferKind::send;
    request.objects = {object};
    std::error_code cause;
    const auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([&](std::error_code ec, std::size_t) {
          ++ended;
          cause = ec;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry);
    EXPECT_FALSE(registry->add(operation));
    turn.arrive_and_wait();
    lane->start(std::make_shared<StripedOperation>(operation, 1), {0, 1});
    turn.arrive_and_wait();
    EXPECT_EQ(ended, round + 1);
    EXPECT_EQ(cause, errc::closed);
    operation->finish(errc::closed);  // if it has not ended: it and the registry hold each other
    ended = round + 1;
    context.poll();
    context.restart();
  }
  disconnecting.join();
}

}  // namespace
}  // namespace kvferry::tcp
