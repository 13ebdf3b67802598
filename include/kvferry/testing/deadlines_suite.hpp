// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/stalled_peer.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Every operation ends by its deadline, its buffers are quiet then, and the channel goes on.
class DeadlinesTests : public StalledPeerBase {
 protected:
  using Milliseconds = std::chrono::milliseconds;
  static constexpr TransferKind send = TransferKind::send;
  static constexpr TransferKind recv = TransferKind::recv;
  static constexpr Milliseconds soon{100};

  void expect_timed_out(Transfer& transfer) {
    const Outcome outcome = transfer.outcome();
    EXPECT_EQ(outcome, failed(errc::timed_out)) << transfer.diagnostic();
    EXPECT_TRUE(is(outcome.error, condition::timed_out));
    EXPECT_TRUE(is(outcome.error, condition::retryable));
    EXPECT_TRUE(transfer.consistent());
  }

 public:
  void RecvWithoutSend() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects target = a.objects({64, 64});
    const auto transfer = start(recv, a, b, target, within(soon));
    expect_timed_out(*transfer);
    EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
    EXPECT_TRUE(target.untouched());
    expect_usable(a, b);
  }

  void SendWithoutRecv() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const auto transfer = start(send, a, b, a.objects({64, 64}).fill(1), within(soon));
    expect_timed_out(*transfer);
    EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
    expect_usable(a, b);
  }

  void BlockingForms() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64});
    const TransferSpec spec{.peer_id = b.id(), .timeout = soon};
    std::error_code error;
    EXPECT_EQ(a->batched_recv(objects.writable(), spec, error), 0U);
    EXPECT_EQ(error, errc::timed_out);
    EXPECT_EQ(a->batched_send(objects.readable(), spec, error), 0U);
    EXPECT_EQ(error, errc::timed_out);
    EXPECT_THROW(a->batched_recv(objects.writable(), spec), TransferError);
    EXPECT_THROW(a->batched_send(objects.readable(), spec), TransferError);
    expect_usable(a, b);
  }

  void ZeroAndNegativeTimeouts() {
    const auto [a, b] = connected_pair();
    for (const TransferKind kind : kinds()) {
      for (const int timeout : {0, -1, -1'000'000}) {
        SCOPED_TRACE(::testing::Message() << to_string(kind) << " within " << timeout << " ms");
        expect_timed_out(*start_any(kind, a, b, a.objects({64}).fill(1), std::chrono::milliseconds(timeout)));
      }
    }
    expect_usable(a, b);
    EXPECT_TRUE(b.untouched());
  }

  void TimeoutsThatOverflowAClock() {
    const auto [a, b] = connected_pair();
    const auto forever = std::chrono::milliseconds::max();
    for (const TransferKind kind : kinds()) {
      if (is_one_sided(kind)) {
        EXPECT_EQ(start_any(kind, a, b, a.objects({64}), forever)->outcome(), done(1)) << to_string(kind);
      }
    }
    if (capabilities().send_recv) {
      const auto receiving = start(recv, b, a, b.objects({64}), within(forever));
      const auto sending = start(send, a, b, a.objects({64}), within(forever));
      EXPECT_EQ(receiving->outcome(), done(1));
      EXPECT_EQ(sending->outcome(), done(1));
    }
  }

  void DefaultTimeout() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    NodeSpec spec;
    spec.options.default_timeout = soon;
    const auto [a, b] = connected_pair(spec);
    expect_timed_out(*start(recv, a, b, a.objects({64})));
  }

  void DefaultHandshakeTimeout() {
    const SilentListener nobody;
    NodeSpec spec;
    spec.options.handshake_timeout = soon;
    Node& node = add_node(spec);
    EXPECT_TRUE(is(start_connect(node, node.id(), "nobody", nobody.url())->error(), condition::timed_out));
    EXPECT_TRUE(is(start_side_message(node, nobody.url(), SideMessage("X", {}))->error(), condition::timed_out));
  }

  void RecvThatTimedOutSwallowsNoSend() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    for (std::uint64_t round = 0; round < 5; ++round) {
      Objects abandoned = b.objects({64, 64});
      expect_timed_out(*start(recv, b, a, abandoned, within(std::chrono::milliseconds(20), tagged(1))));
      abandoned.fill(500);
      const Objects target = b.objects({64, 64});
      const auto sending = start(send, a, b, a.objects({64, 64}).fill(round), tagged(1));
      const auto receiving = start(recv, b, a, target, tagged(1));
      ASSERT_EQ(sending->outcome(), done(2)) << sending->diagnostic();
      ASSERT_EQ(receiving->outcome(), done(2)) << receiving->diagnostic();
      ASSERT_TRUE(target.match(round));
      EXPECT_TRUE(abandoned.match(500)) << "the buffers of a recv that has ended were written";
    }
  }

  void SendThatTimedOutMeetsNoRecv() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    for (std::uint64_t round = 0; round < 5; ++round) {
      Objects abandoned = a.objects({64, 64}).fill(500);
      expect_timed_out(*start(send, a, b, abandoned, within(std::chrono::milliseconds(20), tagged(1))));
      abandoned.fill(600);
      const Objects target = b.objects({64, 64});
      const auto receiving = start(recv, b, a, target, tagged(1));
      const auto sending = start(send, a, b, a.objects({64, 64}).fill(round), tagged(1));
      ASSERT_EQ(sending->outcome(), done(2)) << sending->diagnostic();
      ASSERT_EQ(receiving->outcome(), done(2)) << receiving->diagnostic();
      ASSERT_TRUE(target.match(round));
    }
  }

  void OneOfManyTimesOut() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects first = b.objects({64});
    const Objects second = b.objects({64});
    const Objects third = b.objects({64});
    const auto receiving_first = start(recv, b, a, first, tagged(1));
    const auto receiving_second = start(recv, b, a, second, within(soon, tagged(1)));
    const auto receiving_third = start(recv, b, a, third, tagged(1));
    expect_timed_out(*receiving_second);
    EXPECT_EQ(start(send, a, b, a.objects({64}).fill(1), tagged(1))->outcome(), done(1));
    EXPECT_EQ(start(send, a, b, a.objects({64}).fill(2), tagged(1))->outcome(), done(1));
    EXPECT_EQ(receiving_first->outcome(), done(1));
    EXPECT_EQ(receiving_third->outcome(), done(1));
    EXPECT_TRUE(first.match(1));
    EXPECT_TRUE(second.untouched());
    EXPECT_TRUE(third.match(2));
  }

  void DeadlinesRaceWithMeetings() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const NodeSpec spec{.local_bytes = 1 << 20};
    const auto [a, b] = connected_pair(spec, spec);
    std::vector<Objects> ended;
    for (std::uint64_t round = 0; round < 100; ++round) {
      SCOPED_TRACE(round);
      const Objects target = b.objects({3000, 3000});
      const auto brief = std::chrono::milliseconds(round % 4);
      const bool recv_is_brief = round % 8 < 4;
      const auto receiving = start(recv, b, a, target, within(recv_is_brief ? brief : soon, tagged(round)));
      const auto sending =
          start(send, a, b, a.objects({3000, 3000}).fill(round), within(recv_is_brief ? soon : brief, tagged(round)));
      const bool given_up =
          expect_ended_early(sending->outcome(), receiving->outcome(), {errc::timed_out, errc::peer_cancelled});
      EXPECT_TRUE(sending->consistent());
      EXPECT_TRUE(receiving->consistent());
      EXPECT_TRUE(target.guards_intact());
      if (!receiving->outcome().error) {
        EXPECT_TRUE(target.match(round));
      }
      if (!sending->outcome().error) {
        EXPECT_TRUE(target.match(round)) << "sent, but not in the peer's buffers";
      }
      ended.push_back(target);
      ended.back().fill(4242);
      if (given_up) {
        connect_again(a, b);
      }
    }
    expect_usable(a, b);
    for (const Objects& target : ended) {
      EXPECT_TRUE(target.match(4242)) << "written after the recv had ended";
    }
  }

  void StalledPeer() {
    for (const TransferKind kind : kinds()) {
      for (const bool big : {true, false}) {
        SCOPED_TRACE(::testing::Message() << (big ? "big " : "small ") << to_string(kind));
        const auto nodes = pair_with_pausable_peer();
        nodes.b.pause(limit());
        const auto stalled = big ? start_big(kind, nodes, soon) : start_small(kind, nodes, soon);
        expect_ended(stalled, errc::timed_out, nodes.b);
        expect_quiet(nodes, {stalled});
        drop_nodes();
      }
    }
  }

  void PeerThatStalledIsUsableAgain() {
    const auto nodes = pair_with_pausable_peer();
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      nodes.a.reuse_local_memory();
      nodes.b.pause(limit());
      const auto stalled = start_big(kind, nodes, soon);
      expect_ended(stalled, errc::timed_out, nodes.b);
      Objects ended = stalled.objects;
      ended.fill(4242);
      nodes.b.resume();
      // The connection may have been given up meanwhile, to free the buffers.
      connect(nodes.a, nodes.b);
      expect_usable(nodes.a, nodes.b);
      EXPECT_TRUE(ended.match(4242));
    }
  }

  void StalledPeerHoldsNobodyElseUp() {
    const auto nodes = pair_with_pausable_peer();
    Node& other = add_node();
    connect(nodes.a, other);
    nodes.b.pause(limit());
    const auto pending = start_one_of_each(nodes);
    for (int i = 0; i < 5; ++i) {
      expect_usable(nodes.a, other);
    }
    nodes.b.resume();
    for (const auto& stalled : pending) {
      if (is_one_sided(stalled.kind)) {
        EXPECT_EQ(stalled.transfer->outcome(), done(big_pages)) << stalled.transfer->diagnostic();
      } else {
        EXPECT_FALSE(stalled.transfer->ended());
      }
    }
  }
};

KVFERRY_TESTING_SUITE(DeadlinesTest, DeadlinesTests, RecvWithoutSend, SendWithoutRecv, BlockingForms,
                      ZeroAndNegativeTimeouts, TimeoutsThatOverflowAClock, DefaultTimeout, DefaultHandshakeTimeout,
                      RecvThatTimedOutSwallowsNoSend, SendThatTimedOutMeetsNoRecv, OneOfManyTimesOut,
                      DeadlinesRaceWithMeetings, StalledPeer, PeerThatStalledIsUsableAgain,
                      StalledPeerHoldsNobodyElseUp);

}  // namespace kvferry::testing
