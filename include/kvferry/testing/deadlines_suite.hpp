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

namespace kvferry::testing {

/// Every operation ends by its deadline, its buffers are quiet then, and the channel goes on.
template <class Traits>
class DeadlinesTest : public StalledPeerTest<Traits> {
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
};
TYPED_TEST_SUITE_P(DeadlinesTest);

TYPED_TEST_P(DeadlinesTest, RecvWithoutSend) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  const Objects target = a.objects({64, 64});
  const auto transfer = this->start(this->recv, a, b, target, within(this->soon));
  this->expect_timed_out(*transfer);
  EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
  EXPECT_TRUE(target.untouched());
  this->expect_usable(a, b);
}

TYPED_TEST_P(DeadlinesTest, SendWithoutRecv) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  const auto transfer = this->start(this->send, a, b, a.objects({64, 64}).fill(1), within(this->soon));
  this->expect_timed_out(*transfer);
  EXPECT_NE(transfer->diagnostic().find(b.id()), std::string::npos) << transfer->diagnostic();
  this->expect_usable(a, b);
}

TYPED_TEST_P(DeadlinesTest, BlockingForms) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  const Objects objects = a.objects({64});
  const TransferSpec spec{.peer_id = b.id(), .timeout = this->soon};
  std::error_code error;
  EXPECT_EQ(a->batched_recv(objects.writable(), spec, error), 0U);
  EXPECT_EQ(error, errc::timed_out);
  EXPECT_EQ(a->batched_send(objects.readable(), spec, error), 0U);
  EXPECT_EQ(error, errc::timed_out);
  EXPECT_THROW(a->batched_recv(objects.writable(), spec), TransferError);
  EXPECT_THROW(a->batched_send(objects.readable(), spec), TransferError);
  this->expect_usable(a, b);
}

TYPED_TEST_P(DeadlinesTest, ZeroAndNegativeTimeouts) {
  const auto [a, b] = this->connected_pair();
  for (const TransferKind kind : this->kinds()) {
    for (const int timeout : {0, -1, -1'000'000}) {
      SCOPED_TRACE(::testing::Message() << to_string(kind) << " within " << timeout << " ms");
      this->expect_timed_out(*this->start_any(kind, a, b, a.objects({64}).fill(1), std::chrono::milliseconds(timeout)));
    }
  }
  this->expect_usable(a, b);
  EXPECT_TRUE(b.untouched());
}

TYPED_TEST_P(DeadlinesTest, TimeoutsThatOverflowAClock) {
  const auto [a, b] = this->connected_pair();
  const auto forever = std::chrono::milliseconds::max();
  for (const TransferKind kind : this->kinds()) {
    if (kind == TransferKind::write || kind == TransferKind::read) {
      EXPECT_EQ(this->start_any(kind, a, b, a.objects({64}), forever)->outcome(), done(1)) << to_string(kind);
    }
  }
  if (this->capabilities().send_recv) {
    const auto receiving = this->start(this->recv, b, a, b.objects({64}), within(forever));
    const auto sending = this->start(this->send, a, b, a.objects({64}), within(forever));
    EXPECT_EQ(receiving->outcome(), done(1));
    EXPECT_EQ(sending->outcome(), done(1));
  }
}

TYPED_TEST_P(DeadlinesTest, DefaultTimeout) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  NodeSpec spec;
  spec.options.default_timeout = this->soon;
  const auto [a, b] = this->connected_pair(spec);
  this->expect_timed_out(*this->start(this->recv, a, b, a.objects({64})));
}

TYPED_TEST_P(DeadlinesTest, DefaultHandshakeTimeout) {
  const SilentListener nobody;
  NodeSpec spec;
  spec.options.handshake_timeout = this->soon;
  Node& node = this->add_node(spec);
  EXPECT_TRUE(is(this->start_connect(node, node.id(), "nobody", nobody.url())->error(), condition::timed_out));
  EXPECT_TRUE(is(this->start_side_message(node, nobody.url(), SideMessage("X", {}))->error(), condition::timed_out));
}

TYPED_TEST_P(DeadlinesTest, RecvThatTimedOutSwallowsNoSend) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  for (std::uint64_t round = 0; round < 5; ++round) {
    Objects abandoned = b.objects({64, 64});
    this->expect_timed_out(*this->start(this->recv, b, a, abandoned, within(std::chrono::milliseconds(20), tagged(1))));
    abandoned.fill(500);
    const Objects target = b.objects({64, 64});
    const auto sending = this->start(this->send, a, b, a.objects({64, 64}).fill(round), tagged(1));
    const auto receiving = this->start(this->recv, b, a, target, tagged(1));
    EXPECT_EQ(sending->outcome(), done(2)) << sending->diagnostic();
    EXPECT_EQ(receiving->outcome(), done(2)) << receiving->diagnostic();
    EXPECT_TRUE(target.match(round));
    EXPECT_TRUE(abandoned.match(500)) << "the buffers of a recv that has ended were written";
  }
}

TYPED_TEST_P(DeadlinesTest, SendThatTimedOutMeetsNoRecv) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  for (std::uint64_t round = 0; round < 5; ++round) {
    Objects abandoned = a.objects({64, 64}).fill(500);
    this->expect_timed_out(*this->start(this->send, a, b, abandoned, within(std::chrono::milliseconds(20), tagged(1))));
    abandoned.fill(600);
    const Objects target = b.objects({64, 64});
    const auto receiving = this->start(this->recv, b, a, target, tagged(1));
    const auto sending = this->start(this->send, a, b, a.objects({64, 64}).fill(round), tagged(1));
    EXPECT_EQ(sending->outcome(), done(2)) << sending->diagnostic();
    EXPECT_EQ(receiving->outcome(), done(2)) << receiving->diagnostic();
    EXPECT_TRUE(target.match(round));
  }
}

TYPED_TEST_P(DeadlinesTest, OneOfManyTimesOut) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  const Objects first = b.objects({64});
  const Objects second = b.objects({64});
  const Objects third = b.objects({64});
  const auto receiving_first = this->start(this->recv, b, a, first, tagged(1));
  const auto receiving_second = this->start(this->recv, b, a, second, within(this->soon, tagged(1)));
  const auto receiving_third = this->start(this->recv, b, a, third, tagged(1));
  this->expect_timed_out(*receiving_second);
  EXPECT_EQ(this->start(this->send, a, b, a.objects({64}).fill(1), tagged(1))->outcome(), done(1));
  EXPECT_EQ(this->start(this->send, a, b, a.objects({64}).fill(2), tagged(1))->outcome(), done(1));
  EXPECT_EQ(receiving_first->outcome(), done(1));
  EXPECT_EQ(receiving_third->outcome(), done(1));
  EXPECT_TRUE(first.match(1));
  EXPECT_TRUE(second.untouched());
  EXPECT_TRUE(third.match(2));
}

TYPED_TEST_P(DeadlinesTest, DeadlinesRaceWithMeetings) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const NodeSpec spec{.local_bytes = 1 << 20};
  const auto [a, b] = this->connected_pair(spec, spec);
  std::vector<Objects> ended;
  for (std::uint64_t round = 0; round < 100; ++round) {
    SCOPED_TRACE(round);
    const Objects target = b.objects({3000, 3000});
    const auto brief = std::chrono::milliseconds(round % 4);
    const bool recv_is_brief = round % 8 < 4;
    const auto receiving = this->start(this->recv, b, a, target, within(recv_is_brief ? brief : this->soon, tagged(round)));
    const auto sending = this->start(this->send, a, b, a.objects({3000, 3000}).fill(round),
                                     within(recv_is_brief ? this->soon : brief, tagged(round)));
    for (const auto& transfer : {sending, receiving}) {
      const Outcome outcome = transfer->outcome();
      EXPECT_TRUE(!outcome.error || outcome.error == errc::timed_out || outcome.error == errc::peer_cancelled) << outcome;
      EXPECT_TRUE(transfer->consistent());
    }
    EXPECT_TRUE(target.guards_intact());
    if (!receiving->outcome().error) {
      EXPECT_TRUE(target.match(round));
    }
    if (!sending->outcome().error) {
      EXPECT_TRUE(target.match(round)) << "sent, but not in the peer's buffers";
    }
    ended.push_back(target);
    ended.back().fill(4242);
  }
  this->expect_usable(a, b);
  for (const Objects& target : ended) {
    EXPECT_TRUE(target.match(4242)) << "written after the recv had ended";
  }
}

TYPED_TEST_P(DeadlinesTest, StalledPeer) {
  for (const TransferKind kind : this->kinds()) {
    for (const bool big : {true, false}) {
      SCOPED_TRACE(::testing::Message() << (big ? "big " : "small ") << to_string(kind));
      const auto nodes = this->pair_with_pausable_peer();
      nodes.b.pause(this->limit());
      const auto stalled = big ? this->start_big(kind, nodes, this->soon) : this->start_small(kind, nodes, this->soon);
      this->expect_ended(stalled, errc::timed_out, nodes.b);
      this->expect_quiet(nodes, {stalled});
      this->drop_nodes();
    }
  }
}

TYPED_TEST_P(DeadlinesTest, PeerThatStalledIsUsableAgain) {
  const auto nodes = this->pair_with_pausable_peer();
  for (const TransferKind kind : this->kinds()) {
    SCOPED_TRACE(to_string(kind));
    nodes.a.reuse_local_memory();
    nodes.b.pause(this->limit());
    const auto stalled = this->start_big(kind, nodes, this->soon);
    this->expect_ended(stalled, errc::timed_out, nodes.b);
    Objects ended = stalled.objects;
    ended.fill(4242);
    nodes.b.resume();
    // The connection may have been given up meanwhile, to free the buffers.
    this->connect(nodes.a, nodes.b);
    this->expect_usable(nodes.a, nodes.b);
    EXPECT_TRUE(ended.match(4242));
  }
}

TYPED_TEST_P(DeadlinesTest, StalledPeerHoldsNobodyElseUp) {
  const auto nodes = this->pair_with_pausable_peer();
  Node& other = this->add_node();
  this->connect(nodes.a, other);
  nodes.b.pause(this->limit());
  const auto pending = this->start_one_of_each(nodes);
  for (int i = 0; i < 5; ++i) {
    this->expect_usable(nodes.a, other);
  }
  nodes.b.resume();
  for (const auto& stalled : pending) {
    if (stalled.kind == TransferKind::write || stalled.kind == TransferKind::read) {
      EXPECT_EQ(stalled.transfer->outcome(), done(TestFixture::big_pages)) << stalled.transfer->diagnostic();
    } else {
      EXPECT_FALSE(stalled.transfer->ended());
    }
  }
}

REGISTER_TYPED_TEST_SUITE_P(DeadlinesTest, RecvWithoutSend, SendWithoutRecv, BlockingForms, ZeroAndNegativeTimeouts,
                            TimeoutsThatOverflowAClock, DefaultTimeout, DefaultHandshakeTimeout,
                            RecvThatTimedOutSwallowsNoSend, SendThatTimedOutMeetsNoRecv, OneOfManyTimesOut,
                            DeadlinesRaceWithMeetings, StalledPeer, PeerThatStalledIsUsableAgain,
                            StalledPeerHoldsNobodyElseUp);

}  // namespace kvferry::testing
