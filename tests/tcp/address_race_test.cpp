// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/address_race.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <string>
#include <utility>
#include <vector>

#include "common/unanswering_port.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using asio::ip::tcp;
using test::UnansweringPort;

struct Race : ::testing::Test {
  tcp::endpoint at(const std::string& address, std::uint16_t port) { return {asio::ip::make_address(address), port}; }
  /// Refuses connections for as long as it lives.
  tcp::endpoint refusing() {
    closed.open(tcp::v4());
    closed.bind(at("127.0.0.1", 0));
    return closed.local_endpoint();
  }

  void run(std::vector<tcp::endpoint> candidates) {
    std::make_shared<AddressRace>(context.get_executor(), std::move(candidates),
                                  [this](std::error_code ec, tcp::socket socket) {
                                    ++ended;
                                    error = ec;
                                    if (!ec) {
                                      winner = socket.remote_endpoint();
                                    }
                                  })
        ->start();
    context.run();
  }

  asio::io_context context;
  tcp::acceptor acceptor{context, at("127.0.0.3", 0)};
  tcp::socket closed{context};
  int ended = 0;
  std::error_code error;
  tcp::endpoint winner;
};

TEST_F(Race, AnAddressThatDoesNotAnswerIsOvertaken) {
  const UnansweringPort dead("127.0.0.2");
  run({at("127.0.0.2", dead.port()), at("127.0.0.2", dead.port()), acceptor.local_endpoint()});
  EXPECT_FALSE(error) << error.message();
  EXPECT_EQ(winner, acceptor.local_endpoint());
  EXPECT_EQ(ended, 1);
}

TEST_F(Race, AnAddressThatRefusesIsPassedAtOnce) {
  // So many that the test would not come to an end if each took its quarter of a second.
  std::vector<tcp::endpoint> candidates(1000, refusing());
  candidates.push_back(acceptor.local_endpoint());
  run(candidates);
  EXPECT_EQ(winner, acceptor.local_endpoint());
}

TEST_F(Race, IfAllFailTheErrorIsTheLast) {
  const auto refuses = refusing();
  run({refuses, refuses});
  EXPECT_EQ(error, asio::error::connection_refused);
  EXPECT_EQ(ended, 1);
}

TEST_F(Race, EndsWithoutAWordWhenStopped) {
  const UnansweringPort dead("127.0.0.2");
  const auto race = std::make_shared<AddressRace>(
      context.get_executor(), std::vector{at("127.0.0.2", dead.port()), at("127.0.0.2", dead.port())},
      [this](std::error_code, tcp::socket) { ++ended; });
  race->start();
  race->stop();
  context.run();
  EXPECT_EQ(ended, 0);
}

}  // namespace
}  // namespace kvferry::tcp::testing
