// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/cancellation_type.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
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
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Cancellation through the handler's slot. Handlers run, and signals are emitted, on the test's own thread only: that
/// is what Asio asks of those who use slots.
class CancellationTests : public StalledPeerBase {
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
    return {start_adapted(kind, from, to.id(), objects, spec,
                          [&](auto handler) { return cancelled_by(signal, std::move(handler)); }),
            signal};
  }

  /// Runs handlers until this one has run.
  void run_until_ended(ProbeBase& probe) {
    const auto end = std::chrono::steady_clock::now() + limit();
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

  /// @return whether the connection was given up, with all of its operations, as a busy machine kept the peer from dealing in time with
  /// what was on its way of the cancelled ones.
  [[nodiscard]] bool cancel_some_of_many_writes() {
    const auto [a, b] = connected_pair({.local_bytes = 1 << 20}, {.regions = {{203}}});
    std::vector<Cancellable> writes;
    for (std::uint64_t i = 0; i < 200; ++i) {
      writes.push_back(start_cancellable(TransferKind::write, a, b, a.objects({4096}).fill(i), at({i})));
    }
    for (std::size_t i = 0; i < writes.size(); i += 2) {
      writes[i].cancel();
    }
    std::vector<Outcome> outcomes;
    for (const Cancellable& write : writes) {
      outcomes.push_back(outcome_of(write));
    }
    const Outcome in_the_middle = failed(errc::cancelled_in_flight);
    const bool given_up = std::ranges::find(outcomes, in_the_middle) != outcomes.end();
    for (std::size_t i = 0; i < writes.size(); ++i) {
      SCOPED_TRACE(i);
      const Outcome& outcome = outcomes[i];
      const bool may_be_cancelled = i % 2 == 0 && (outcome == failed(errc::cancelled) || outcome == in_the_middle);
      EXPECT_TRUE(outcome == done(1) || may_be_cancelled || (given_up && outcome.error == condition::peer_failed))
          << outcome;
      if (!outcome.error) {
        EXPECT_TRUE(matches(b.page(i), i));
      }
    }
    if (!given_up) {
      expect_usable(a, b);
    }
    return given_up;
  }

 public:
  void UnmetSendAndRecv() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    for (const TransferKind kind : {send, recv}) {
      for (const auto type : all_types) {
        SCOPED_TRACE(to_string(kind));
        const auto transfer = start_cancellable(kind, a, b, a.objects({64, 64}), tagged(1));
        transfer.cancel(type);
        const Outcome outcome = outcome_of(transfer);
        ASSERT_EQ(outcome, failed(errc::cancelled));
        EXPECT_TRUE(is(outcome.error, condition::cancelled));
      }
    }
    expect_usable(a, b);
  }

  void RecvThatWasCancelledSwallowsNoSend() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    for (std::uint64_t round = 0; round < 20; ++round) {
      Objects abandoned = b.objects({64});
      const auto cancelled = start_cancellable(recv, b, a, abandoned, tagged(1));
      cancelled.cancel();
      ASSERT_EQ(outcome_of(cancelled), failed(errc::cancelled));
      abandoned.fill(500);
      const Objects target = b.objects({64});
      const auto sending = start(send, a, b, a.objects({64}).fill(round), tagged(1));
      const auto receiving = start(recv, b, a, target, tagged(1));
      ASSERT_EQ(sending->outcome(), done(1)) << sending->diagnostic();
      ASSERT_EQ(receiving->outcome(), done(1)) << receiving->diagnostic();
      ASSERT_TRUE(target.match(round));
      EXPECT_TRUE(abandoned.match(500));
    }
  }

  void SendThatWasCancelledMeetsNoRecv() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    for (std::uint64_t round = 0; round < 20; ++round) {
      const auto cancelled = start_cancellable(send, a, b, a.objects({64}).fill(500), tagged(1));
      cancelled.cancel();
      ASSERT_EQ(outcome_of(cancelled), failed(errc::cancelled));
      const Objects target = b.objects({64});
      const auto receiving = start(recv, b, a, target, tagged(1));
      const auto sending = start(send, a, b, a.objects({64}).fill(round), tagged(1));
      ASSERT_EQ(sending->outcome(), done(1)) << sending->diagnostic();
      ASSERT_EQ(receiving->outcome(), done(1)) << receiving->diagnostic();
      ASSERT_TRUE(target.match(round));
    }
  }

  void OneOfManyOfATag() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::vector<Objects> targets;
    std::vector<Cancellable> recvs;
    for (std::size_t i = 0; i < 5; ++i) {
      targets.push_back(b.objects({64}));
      recvs.push_back(start_cancellable(recv, b, a, targets.back(), tagged(1)));
    }
    recvs[2].cancel();
    EXPECT_EQ(outcome_of(recvs[2]), failed(errc::cancelled));
    for (const std::uint64_t i : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{3}, std::uint64_t{4}}) {
      EXPECT_EQ(start(send, a, b, a.objects({64}).fill(i), tagged(1))->outcome(), done(1));
      EXPECT_EQ(outcome_of(recvs[i]), done(1));
      EXPECT_TRUE(targets[i].match(i));
    }
    EXPECT_TRUE(targets[2].untouched());
  }

  void AfterTheEndIsHarmless() {
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{1};
    for (const TransferKind kind : kinds()) {
      if (kind == send || kind == recv) {
        continue;
      }
      const auto transfer = start_cancellable(kind, a, b, a.objects({64}), at(indexes));
      EXPECT_EQ(outcome_of(transfer), done(1));
      for (const auto type : all_types) {
        transfer.cancel(type);
      }
    }
    if (capabilities().send_recv) {
      const auto receiving = start_cancellable(recv, b, a, b.objects({64}), tagged(1));
      const auto sending = start_cancellable(send, a, b, a.objects({64}), tagged(1));
      EXPECT_EQ(outcome_of(receiving), done(1));
      EXPECT_EQ(outcome_of(sending), done(1));
      receiving.cancel();
      sending.cancel();
    }
    expect_usable(a, b);
  }

  void BetweenTheEndAndTheHandlerIsHarmless() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects target = b.objects({64});
    const auto sending = start_cancellable(send, a, b, a.objects({64}).fill(1), tagged(1));
    EXPECT_EQ(start(recv, b, a, target, tagged(1))->outcome(), done(1));
    // By the time that a later exchange is over, the send's handler is queued; it has not run, for nobody ran the loop.
    expect_usable(a, b);
    sending.cancel();
    const Outcome outcome = outcome_of(sending);
    EXPECT_TRUE(outcome == done(1) || outcome.error == errc::cancelled) << outcome;
    EXPECT_TRUE(target.match(1));
  }

  void StalledPeer() {
    for (const TransferKind kind : kinds()) {
      for (const bool big : {true, false}) {
        SCOPED_TRACE(::testing::Message() << (big ? "big " : "small ") << to_string(kind));
        const auto nodes = pair_with_pausable_peer();
        nodes.b.pause(limit());
        const std::size_t count = big ? big_pages : 3;
        const Objects objects = nodes.a.objects(count, big ? big_page : 100).fill(stalled_seed);
        const std::vector<std::uint64_t> indexes = consecutive(0, count);
        const auto transfer = start_cancellable(kind, nodes.a, nodes.b, objects, spec_of(kind, indexes));
        transfer.cancel();
        run_until_ended(*transfer.transfer);
        const Stalled stalled{kind, transfer.transfer, objects};
        expect_ended(stalled, errc::cancelled, nodes.b);
        Objects ended = objects;
        ended.fill(4242);
        nodes.b.resume();
        connect(nodes.a, nodes.b);
        expect_usable(nodes.a, nodes.b);
        EXPECT_TRUE(ended.match(4242)) << "written after the end";
        drop_nodes();
      }
    }
  }

  void SomeOfManyWrites() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto end = std::chrono::steady_clock::now() + limit();
    while (cancel_some_of_many_writes() && !HasFailure()) {
      ASSERT_LT(std::chrono::steady_clock::now(), end) << "the connection is given up each time";
      drop_nodes();
    }
  }

  void RacesWithMeetings() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const NodeSpec spec{.local_bytes = 2 << 20};
    const auto [a, b] = connected_pair(spec, spec);
    const auto brief = std::chrono::milliseconds(50);
    for (std::uint64_t round = 0; round < 60; ++round) {
      SCOPED_TRACE(round);
      a.reuse_local_memory();
      b.reuse_local_memory();
      const std::size_t size = round % 3 == 0 ? 1'000'000 : 1000;
      const Objects target = b.objects({size});
      const auto receiving = start_cancellable(recv, b, a, target, within(brief, tagged(round)));
      const auto sending = start_cancellable(send, a, b, a.objects({size}).fill(round), within(brief, tagged(round)));
      (round % 2 == 0 ? receiving : sending).cancel();
      const Outcome sent = outcome_of(sending);
      const Outcome received = outcome_of(receiving);
      const bool given_up =
          expect_ended_early(sent, received, {errc::cancelled, errc::peer_cancelled, errc::timed_out});
      if (!sent.error || !received.error) {
        EXPECT_TRUE(target.match(round));
      }
      EXPECT_TRUE(target.guards_intact());
      if (given_up) {
        connect_again(a, b);
      }
    }
    expect_usable(a, b);
  }

  void ReceiveNotification() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    auto& signal = add_signal();
    const auto waiting = watch<NotificationProbe>("a receive_notification that is cancelled");
    b->async_receive_notification({}, cancelled_by(signal, waiting->handler()));
    signal.emit(asio::cancellation_type::terminal);
    run_until_ended(*waiting);
    EXPECT_EQ(waiting->error(), errc::cancelled);

    const std::vector<std::byte> payload(3);
    EXPECT_EQ(start(TransferKind::write, a, b, a.objects({64}), notifying(payload, at({1})))->outcome(), done(1));
    const auto next = start_receive_notification(b);
    EXPECT_EQ(std::get<1>(next->results()).payload, payload) << "swallowed by the one that was cancelled";
  }

  void ReceiveNotificationsLeavesWhatHasCome() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    constexpr std::uint64_t key = 7;
    const std::vector<std::byte> payload(3);
    auto& signal = add_signal();
    using NotificationsProbe = Probe<std::error_code, std::vector<Notification>>;
    const auto waiting = watch<NotificationsProbe>("a receive_notifications that is cancelled");
    b->async_receive_notifications(key, 2, {}, cancelled_by(signal, waiting->handler()));
    a->notify(b.id(), payload, {.key = key});
    signal.emit(asio::cancellation_type::terminal);
    run_until_ended(*waiting);
    EXPECT_EQ(waiting->error(), errc::cancelled);
    EXPECT_EQ(b->receive_notifications(key, 1, limit()).size(), 1U);
  }

  /// The peer answers nothing meanwhile.
  void DisconnectConnectAndNotify() {
    const auto [a, b] = connected_pair({}, {.pausable = true});
    Node& other = add_node();
    const auto metadata = b->local_metadata(b.id());
    using Ended = Probe<std::error_code>;
    const std::vector<std::byte> payload(1);
    b.pause(limit());
    if (capabilities().notifications) {
      // One may be answered before it is cancelled.
      bool cancelled = false;
      for (int i = 0; i < 50 && !cancelled; ++i) {
        auto& signal = add_signal();
        const auto notify = watch<Ended>("a notify that is cancelled");
        a->async_notify(b.id(), payload, {}, cancelled_by(signal, notify->handler()));
        signal.emit(asio::cancellation_type::terminal);
        run_until_ended(*notify);
        cancelled = is(notify->error(), condition::cancelled);
        EXPECT_TRUE(cancelled || !notify->error()) << notify->error().message();
      }
      EXPECT_TRUE(cancelled);
    }
    auto& of_connect = add_signal();
    const auto connecting = watch<Probe<std::error_code, PeerInfo>>("a connect that is cancelled");
    other->async_connect(other.id(), metadata, {}, cancelled_by(of_connect, connecting->handler()));
    of_connect.emit(asio::cancellation_type::terminal);
    run_until_ended(*connecting);
    EXPECT_EQ(connecting->error(), errc::cancelled);
    auto& of_disconnect = add_signal();
    const auto leaving = watch<Ended>("a disconnect that is cancelled");
    a->async_disconnect(b.id(), cancelled_by(of_disconnect, leaving->handler()));
    of_disconnect.emit(asio::cancellation_type::terminal);
    run_until_ended(*leaving);
    EXPECT_TRUE(!leaving->error() || leaving->error() == errc::cancelled) << leaving->error().message();
    b.resume();
    // Only the wait had ended.
    a->disconnect(b.id());
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
  }

  /// Though the peer would accept it.
  void ConnectThatWasCancelledConnectsNobody() {
    constexpr std::chrono::milliseconds some_time{300};
    Node& a = add_node();
    Node& b = add_node({.pausable = true});
    auto& signal = add_signal();
    const auto connecting = watch<SideMessageProbe>("a connect that is cancelled");
    b.pause(limit());
    a->async_lazy_init_peer_connection(a.id(), b.id(), b.url(), {}, {}, cancelled_by(signal, connecting->handler()));
    signal.emit(asio::cancellation_type::terminal);
    run_until_ended(*connecting);
    EXPECT_EQ(connecting->error(), errc::cancelled);
    b.resume();
    std::error_code ec;
    (void)a->wait_peer_event(some_time, ec);
    EXPECT_EQ(ec, errc::timed_out) << "it went on";
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
    connect(a, b);
    EXPECT_TRUE(a->remote_xfer_handler_exists(b.id()));
  }

  void HandshakeAndSideMessage() {
    const SilentListener nobody;
    Node& node = add_node();
    auto& signal = add_signal();
    auto& other_signal = add_signal();
    const auto handshake = watch<SideMessageProbe>("a handshake that is cancelled");
    const auto question = watch<SideMessageProbe>("a side message that is cancelled");
    node->async_lazy_init_peer_connection(node.id(), "nobody", nobody.url(), {}, {},
                                          cancelled_by(signal, handshake->handler()));
    node->async_send_init_side_msg(nobody.url(), SideMessage("X", {}), {},
                                   cancelled_by(other_signal, question->handler()));
    signal.emit(asio::cancellation_type::terminal);
    other_signal.emit(asio::cancellation_type::terminal);
    run_until_ended(*handshake);
    run_until_ended(*question);
    EXPECT_EQ(handshake->error(), errc::cancelled);
    EXPECT_EQ(question->error(), errc::cancelled);
  }

 private:
  asio::io_context loop_;
  std::list<asio::cancellation_signal> signals_;
};

KVFERRY_TESTING_SUITE(CancellationTest, CancellationTests, UnmetSendAndRecv, RecvThatWasCancelledSwallowsNoSend,
                      SendThatWasCancelledMeetsNoRecv, OneOfManyOfATag, AfterTheEndIsHarmless,
                      BetweenTheEndAndTheHandlerIsHarmless, StalledPeer, SomeOfManyWrites, RacesWithMeetings,
                      ReceiveNotification, ReceiveNotificationsLeavesWhatHasCome, DisconnectConnectAndNotify,
                      ConnectThatWasCancelledConnectsNobody, HandshakeAndSideMessage);

}  // namespace kvferry::testing
