// SPDX-License-Identifier: Apache-2.0
// A peer with so many handshakes that it lets go of some before their connections come.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

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
  static constexpr int crowd = 2;

  CrowdedHandshakes() {
    TcpOptions options;
    options.max_peers = 16;
    options.advertised_data_address = relay_.address();
    b_.emplace(4, options);
    relay_.set_target(b_->channel->data_port());
    relay_.pause();
  }

  /// Handshakes that their askers don't go on with.
  void ask(int count) {
    for (int i = 0; i < count; ++i) {
      const auto [ec, answer] = ask_as(stranger_, "stranger " + std::to_string(++strangers_), *b_, "b", 100);
      ASSERT_FALSE(ec) << ec.message();
      ASSERT_EQ(answer->status, kit::InitAnswer::ok);
    }
  }
  /// Returns when the handshake is over and the data connection under way.
  auto begin_connect(std::chrono::milliseconds timeout) {
    auto connecting = a_.channel->async_lazy_init_peer_connection(
        "a", "b", b_->channel->peer_init_url(), {}, {.timeout = timeout, .diagnostic = &why_}, asio::use_future);
    EXPECT_TRUE(comes_true([&] { return relay_.connections() > 0; }));
    relay_.pause();  // once more: now the relay has got through to where it leads
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
  static std::uint64_t count_of(errc cause, const std::vector<CauseCount>& counts) {
    const auto found = std::ranges::find(counts, make_error_code(cause), &CauseCount::cause);
    return found == counts.end() ? 0 : found->count;
  }

  static TcpOptions with_one_lane() {
    TcpOptions options;
    options.lanes_per_peer = 1;
    return options;
  }

  Relay relay_;
  std::optional<Node> b_;
  Node stranger_{1, {}, false};
  int strangers_ = 0;
  std::string why_;
  Node a_{4, with_one_lane(), false};
};

TEST_F(CrowdedHandshakes, APeerThatHadToMakeRoomAsksAnew) {
  ASSERT_NO_FATAL_FAILURE(ask(crowd));
  auto connecting = begin_connect(long_enough);
  ASSERT_NO_FATAL_FAILURE(ask(room_of_an_address));
  EXPECT_EQ(count_of(errc::resource_limit, b_->channel->stats().handshakes.refused), crowd + 1U)
      << "the peer's has made room";
  relay_.resume();
  EXPECT_FALSE(outcome(connecting)) << why_;
  EXPECT_FALSE(write_one(a_, "b"));
  EXPECT_EQ(count_of(errc::peer_closed, a_.channel->stats().handshakes.failed), 1U);
}

TEST_F(CrowdedHandshakes, OneThatIsGoneIsAskedUntilTheDeadline) {
  ASSERT_NO_FATAL_FAILURE(ask(crowd));
  auto connecting = begin_connect(long_enough / 8);
  b_.reset();
  relay_.resume();
  EXPECT_EQ(outcome(connecting), errc::timed_out) << why_;
  EXPECT_NE(why_.find("no answer from"), std::string::npos) << why_;
  EXPECT_NE(why_.find("was closed before it was welcomed"), std::string::npos) << why_;
}

TEST_F(CrowdedHandshakes, NobodyIsAskedWhenNoCallWaitsAnyLonger) {
  asio::io_context context;
  const asio::ip::tcp::socket does_not_listen(context, {asio::ip::address_v4::loopback(), 0});
  relay_.set_target(does_not_listen.local_endpoint().port());  // so each connection is closed at once
  ASSERT_NO_FATAL_FAILURE(ask(crowd));
  auto connecting = begin_connect(long_enough / 8);
  EXPECT_EQ(outcome(connecting), errc::timed_out) << why_;
  const auto failed = [&] { return a_.channel->stats().handshakes.failed; };
  EXPECT_TRUE(comes_true([&] { return count_of(errc::timed_out, failed()) == 1; })) << "the last attempt goes on";
  EXPECT_GE(failed().size(), 2U) << "it has been closed, too";
}

TEST_F(CrowdedHandshakes, WhereThereIsNoCrowdTheCallEndsWithItsCause) {
  auto connecting = begin_connect(long_enough);
  b_.reset();
  relay_.resume();
  EXPECT_EQ(outcome(connecting), condition::peer_failed) << why_;
}

}  // namespace
}  // namespace kvferry::tcp::testing
