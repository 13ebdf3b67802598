// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/cancellation_type.hpp>
#include <asio/io_context.hpp>

#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/stalled_peer.hpp>

namespace kvferry::testing {

/// Cancellation through the handler's slot. Handlers run, and signals are emitted, on the test's own thread only: that is
/// what Asio asks of those who use slots.
template <class Traits>
class CancellationTest : public StalledPeerTest<Traits> {
 protected:
  static constexpr TransferKind send = TransferKind::send;
  static constexpr TransferKind recv = TransferKind::recv;
  static constexpr auto all_types = {asio::cancellation_type::terminal, asio::cancellation_type::partial,
                                     asio::cancellation_type::total};

  /// A transfer that can be cancelled.
  struct Cancellable {
    std::shared_ptr<Transfer> transfer;
    asio::cancellation_signal& signal;

    void cancel(asio::cancellation_type type = asio::cancellation_type::terminal) const { signal.emit(type); }
  };

  template <class Handler>
  [[nodiscard]] auto cancelled_by(asio::cancellation_signal& signal, Handler handler) {
    return asio::bind_cancellation_slot(signal.slot(), asio::bind_executor(loop_.get_executor(), std::move(handler)));
  }

  [[nodiscard]] Cancellable start_cancellable(TransferKind kind, Node& from, const Node& to, const Objects& objects,
                                              const TransferSpec& spec) {
    auto& signal = signals_.emplace_back();
    return {this->start_adapted(kind, from, to.id(), objects, spec,
                                [&](auto handler) { return cancelled_by(signal, std::move(handler)); }),
            signal};
  }

  /// Runs handlers until this one has run.
  void run_until_ended(ProbeBase& probe) {
    const auto end = std::chrono::steady_clock::now() + this->limit();
    while (!probe.ended() && std::chrono::steady_clock::now() < end) {
      loop_.restart();
      loop_.run_one_until(end);
    }
    EXPECT_TRUE(probe.ended()) << "no handler ran within the limit";
  }

  Outcome outcome_of(const Cancellable& cancellable) {
    run_until_ended(*cancellable.transfer);
    EXPECT_TRUE(cancellable.transfer->consistent());
    return cancellable.transfer->outcome();
  }

  asio::cancellation_signal& add_signal() { return signals_.emplace_back(); }

 private:
  asio::io_context loop_;
  std::list<asio::cancellation_signal> signals_;
};
TYPED_TEST_SUITE_P(CancellationTest);

TYPED_TEST_P(CancellationTest, UnmetSendAndRecv) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  for (const TransferKind kind : {this->send, this->recv}) {
    for (const auto type : this->all_types) {
      SCOPED_TRACE(to_string(kind));
      const auto transfer = this->start_cancellable(kind, a, b, a.objects({64, 64}), tagged(1));
      transfer.cancel(type);
      const Outcome outcome = this->outcome_of(transfer);
      EXPECT_EQ(outcome, failed(errc::cancelled));
      EXPECT_TRUE(is(outcome.error, condition::cancelled));
    }
  }
  this->expect_usable(a, b);
}

TYPED_TEST_P(CancellationTest, RecvThatWasCancelledSwallowsNoSend) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  for (std::uint64_t round = 0; round < 20; ++round) {
    Objects abandoned = b.objects({64});
    const auto cancelled = this->start_cancellable(this->recv, b, a, abandoned, tagged(1));
    cancelled.cancel();
    EXPECT_EQ(this->outcome_of(cancelled), failed(errc::cancelled));
    abandoned.fill(500);
    const Objects target = b.objects({64});
    const auto sending = this->start(this->send, a, b, a.objects({64}).fill(round), tagged(1));
    const auto receiving = this->start(this->recv, b, a, target, tagged(1));
    EXPECT_EQ(sending->outcome(), done(1));
    EXPECT_EQ(receiving->outcome(), done(1));
    EXPECT_TRUE(target.match(round));
    EXPECT_TRUE(abandoned.match(500));
  }
}

TYPED_TEST_P(CancellationTest, SendThatWasCancelledMeetsNoRecv) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  for (std::uint64_t round = 0; round < 20; ++round) {
    const auto cancelled = this->start_cancellable(this->send, a, b, a.objects({64}).fill(500), tagged(1));
    cancelled.cancel();
    EXPECT_EQ(this->outcome_of(cancelled), failed(errc::cancelled));
    const Objects target = b.objects({64});
    const auto receiving = this->start(this->recv, b, a, target, tagged(1));
    const auto sending = this->start(this->send, a, b, a.objects({64}).fill(round), tagged(1));
    EXPECT_EQ(sending->outcome(), done(1));
    EXPECT_EQ(receiving->outcome(), done(1));
    EXPECT_TRUE(target.match(round));
  }
}

TYPED_TEST_P(CancellationTest, OneOfManyOfATag) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  std::vector<Objects> targets;
  std::vector<typename TestFixture::Cancellable> recvs;
  for (std::size_t i = 0; i < 5; ++i) {
    targets.push_back(b.objects({64}));
    recvs.push_back(this->start_cancellable(this->recv, b, a, targets.back(), tagged(1)));
  }
  recvs[2].cancel();
  EXPECT_EQ(this->outcome_of(recvs[2]), failed(errc::cancelled));
  for (const std::uint64_t i : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{3}, std::uint64_t{4}}) {
    EXPECT_EQ(this->start(this->send, a, b, a.objects({64}).fill(i), tagged(1))->outcome(), done(1));
    EXPECT_EQ(this->outcome_of(recvs[i]), done(1));
    EXPECT_TRUE(targets[i].match(i));
  }
  EXPECT_TRUE(targets[2].untouched());
}

TYPED_TEST_P(CancellationTest, AfterTheEndIsHarmless) {
  const auto [a, b] = this->connected_pair();
  const std::vector<std::uint64_t> indexes{1};
  for (const TransferKind kind : this->kinds()) {
    if (kind == this->send || kind == this->recv) {
      continue;
    }
    const auto transfer = this->start_cancellable(kind, a, b, a.objects({64}), at(indexes));
    EXPECT_EQ(this->outcome_of(transfer), done(1));
    for (const auto type : this->all_types) {
      transfer.cancel(type);
    }
  }
  if (this->capabilities().send_recv) {
    const auto receiving = this->start_cancellable(this->recv, b, a, b.objects({64}), tagged(1));
    const auto sending = this->start_cancellable(this->send, a, b, a.objects({64}), tagged(1));
    EXPECT_EQ(this->outcome_of(receiving), done(1));
    EXPECT_EQ(this->outcome_of(sending), done(1));
    receiving.cancel();
    sending.cancel();
  }
  this->expect_usable(a, b);
}

TYPED_TEST_P(CancellationTest, BetweenTheEndAndTheHandlerIsHarmless) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const auto [a, b] = this->connected_pair();
  const Objects target = b.objects({64});
  const auto sending = this->start_cancellable(this->send, a, b, a.objects({64}).fill(1), tagged(1));
  EXPECT_EQ(this->start(this->recv, b, a, target, tagged(1))->outcome(), done(1));
  // By the time that a later exchange is over, the send's handler is queued; it has not run, for nobody ran the loop.
  this->expect_usable(a, b);
  sending.cancel();
  const Outcome outcome = this->outcome_of(sending);
  EXPECT_TRUE(outcome == done(1) || outcome.error == errc::cancelled) << outcome;
  EXPECT_TRUE(target.match(1));
}

TYPED_TEST_P(CancellationTest, StalledPeer) {
  for (const TransferKind kind : this->kinds()) {
    for (const bool big : {true, false}) {
      SCOPED_TRACE(::testing::Message() << (big ? "big " : "small ") << to_string(kind));
      const auto nodes = this->pair_with_pausable_peer();
      nodes.b.pause(this->limit());
      const std::size_t count = big ? TestFixture::big_pages : 3;
      const Objects objects = nodes.a.objects(count, big ? TestFixture::big_page : 100).fill(TestFixture::stalled_seed);
      const std::vector<std::uint64_t> indexes = this->consecutive(0, count);
      const bool one_sided = kind == TransferKind::write || kind == TransferKind::read;
      const auto transfer =
          this->start_cancellable(kind, nodes.a, nodes.b, objects, one_sided ? at(indexes) : tagged(0));
      transfer.cancel();
      this->run_until_ended(*transfer.transfer);
      const typename TestFixture::Stalled stalled{kind, transfer.transfer, objects};
      this->expect_ended(stalled, errc::cancelled, nodes.b);
      Objects ended = objects;
      ended.fill(4242);
      nodes.b.resume();
      this->connect(nodes.a, nodes.b);
      this->expect_usable(nodes.a, nodes.b);
      EXPECT_TRUE(ended.match(4242)) << "written after the end";
      this->drop_nodes();
    }
  }
}

TYPED_TEST_P(CancellationTest, SomeOfManyWrites) {
  KVFERRY_TESTING_REQUIRE(write);
  const auto [a, b] = this->connected_pair({.local_bytes = 1 << 20}, {.regions = {{200}}});
  std::vector<typename TestFixture::Cancellable> writes;
  for (std::uint64_t i = 0; i < 200; ++i) {
    writes.push_back(this->start_cancellable(TransferKind::write, a, b, a.objects({4096}).fill(i), at({i})));
  }
  for (std::size_t i = 0; i < writes.size(); i += 2) {
    writes[i].cancel();
  }
  for (std::size_t i = 0; i < writes.size(); ++i) {
    SCOPED_TRACE(i);
    const Outcome outcome = this->outcome_of(writes[i]);
    EXPECT_TRUE(outcome == done(1) || (i % 2 == 0 && outcome == failed(errc::cancelled))) << outcome;
    if (!outcome.error) {
      EXPECT_TRUE(matches(b.page(i), i));
    }
  }
  this->expect_usable(a, b);
}

TYPED_TEST_P(CancellationTest, RacesWithMeetings) {
  KVFERRY_TESTING_REQUIRE(send_recv);
  const NodeSpec spec{.local_bytes = 2 << 20};
  const auto [a, b] = this->connected_pair(spec, spec);
  const auto brief = std::chrono::milliseconds(50);
  for (std::uint64_t round = 0; round < 60; ++round) {
    SCOPED_TRACE(round);
    a.reuse_local_memory();
    b.reuse_local_memory();
    const std::size_t size = round % 3 == 0 ? 1'000'000 : 1000;
    const Objects target = b.objects({size});
    const auto receiving = this->start_cancellable(this->recv, b, a, target, within(brief, tagged(round)));
    const auto sending =
        this->start_cancellable(this->send, a, b, a.objects({size}).fill(round), within(brief, tagged(round)));
    (round % 2 == 0 ? receiving : sending).cancel();
    for (const auto& transfer : {sending, receiving}) {
      const Outcome outcome = this->outcome_of(transfer);
      EXPECT_TRUE(!outcome.error || outcome.error == errc::cancelled || outcome.error == errc::peer_cancelled ||
                  outcome.error == errc::timed_out)
          << outcome;
      if (!outcome.error) {
        EXPECT_TRUE(target.match(round));
      }
    }
    EXPECT_TRUE(target.guards_intact());
  }
  this->expect_usable(a, b);
}

TYPED_TEST_P(CancellationTest, ReceiveNotification) {
  KVFERRY_TESTING_REQUIRE(notifications);
  const auto [a, b] = this->connected_pair();
  auto& signal = this->add_signal();
  const auto waiting = this->template watch<NotificationProbe>("a receive_notification that is cancelled");
  b->async_receive_notification({}, this->cancelled_by(signal, waiting->handler()));
  signal.emit(asio::cancellation_type::terminal);
  this->run_until_ended(*waiting);
  EXPECT_EQ(waiting->error(), errc::cancelled);

  const std::vector<std::byte> payload(3);
  EXPECT_EQ(this->start(TransferKind::write, a, b, a.objects({64}), notifying(payload, at({1})))->outcome(), done(1));
  const auto next = this->start_receive_notification(b);
  EXPECT_EQ(std::get<1>(next->results()).payload, payload) << "swallowed by the one that was cancelled";
}

TYPED_TEST_P(CancellationTest, HandshakeAndSideMessage) {
  const SilentListener nobody;
  Node& node = this->add_node();
  auto& signal = this->add_signal();
  auto& other_signal = this->add_signal();
  const auto handshake = this->template watch<SideMessageProbe>("a handshake that is cancelled");
  const auto question = this->template watch<SideMessageProbe>("a side message that is cancelled");
  node->async_lazy_init_peer_connection(node.id(), "nobody", nobody.url(), {}, {},
                                        this->cancelled_by(signal, handshake->handler()));
  node->async_send_init_side_msg(nobody.url(), SideMessage("X", {}), {},
                                 this->cancelled_by(other_signal, question->handler()));
  signal.emit(asio::cancellation_type::terminal);
  other_signal.emit(asio::cancellation_type::terminal);
  this->run_until_ended(*handshake);
  this->run_until_ended(*question);
  EXPECT_EQ(handshake->error(), errc::cancelled);
  EXPECT_EQ(question->error(), errc::cancelled);
}

REGISTER_TYPED_TEST_SUITE_P(CancellationTest, UnmetSendAndRecv, RecvThatWasCancelledSwallowsNoSend,
                            SendThatWasCancelledMeetsNoRecv, OneOfManyOfATag, AfterTheEndIsHarmless,
                            BetweenTheEndAndTheHandlerIsHarmless, StalledPeer, SomeOfManyWrites, RacesWithMeetings,
                            ReceiveNotification, HandshakeAndSideMessage);

}  // namespace kvferry::testing
