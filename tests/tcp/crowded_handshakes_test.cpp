// SPDX-License-Identifier: Apache-2.0
// A peer with so many handshakes that it lets go of some before their connections come.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <chrono>
#include <optional>
#include <string>
#include <system_error>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"
#include "common/comes_true.hpp"
#include "peer_identity.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry_test::comes_true;

/// "b" has room for 12 handshakes, 9 of one address. What is said on data connections to it waits until the relay goes on.
class CrowdedHandshakes : public ::testing::Test {
 protected:
  static constexpr int room_of_an_address = 9;

  CrowdedHandshakes() {
    TcpOptions options;
    options.max_peers = 16;
    options.advertised_data_address = relay_.address();
    b_.emplace(4, options);
    relay_.set_target(b_->channel->data_port());
    relay_.pause();
  }

  /// Returns when the handshake is over and the data connection under way.
  auto begin_connect(std::chrono::milliseconds timeout) {
    auto connecting = a_.channel->async_lazy_init_peer_connection(
        "a", "b", b_->channel->peer_init_url(), {}, {.timeout = timeout, .diagnostic = &why_}, asio::use_future);
    EXPECT_TRUE(comes_true([&] { return relay_.connections() > 0; }));
    return connecting;
  }
  template <class Call>
  static std::error_code outcome(Call& call) {
    try {
      (void)call.get();
      return {};
    } catch (const std::system_error& error) {
      return error.code();
    }
  }

  Relay relay_;
  std::optional<Node> b_;
  Node a_{4, {}, false};
  std::string why_;
};

TEST_F(CrowdedHandshakes, APeerThatHadToMakeRoomAsksAnew) {
  auto connecting = begin_connect(long_enough);
  Node stranger(1, {}, false);
  for (int i = 0; i < room_of_an_address; ++i) {
    const auto [ec, answer] = ask_as(stranger, "stranger " + std::to_string(i), *b_, "b", 100);
    ASSERT_FALSE(ec) << ec.message();
    ASSERT_EQ(answer->status, kit::InitAnswer::ok);
  }
  const auto refused = b_->channel->stats().handshakes.refused;
  ASSERT_EQ(refused.size(), 1U) << "the peer's has made room";
  EXPECT_EQ(refused.front().cause, errc::resource_limit);
  EXPECT_EQ(refused.front().count, 1U);
  relay_.resume();
  EXPECT_FALSE(outcome(connecting)) << why_;
  EXPECT_FALSE(write_one(a_, "b"));
}

TEST_F(CrowdedHandshakes, OneThatIsGoneIsAskedUntilTheDeadline) {
  auto connecting = begin_connect(long_enough / 8);
  b_.reset();
  relay_.resume();
  EXPECT_EQ(outcome(connecting), errc::timed_out) << why_;
  EXPECT_NE(why_.find("no answer from"), std::string::npos) << why_;
}

}  // namespace
}  // namespace kvferry::tcp::testing
