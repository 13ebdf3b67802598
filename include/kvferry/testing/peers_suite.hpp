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
#include <kvferry/peer_event.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Peers that come and go: connections, events, and disconnecting one peer.
class PeersTests : public ConformanceBase {
 protected:
  using EventProbe = Probe<std::error_code, PeerEvent>;
  using DisconnectProbe = Probe<std::error_code>;

  std::shared_ptr<EventProbe> start_wait(Node& node, std::optional<Milliseconds> timeout = {}) {
    auto probe = watch<EventProbe>(node.id() + "'s wait_peer_event");
    const InitiationScope initiating;
    node->async_wait_peer_event(timeout, probe->handler());
    return probe;
  }

  std::shared_ptr<DisconnectProbe> start_disconnect(Node& node, std::string_view peer) {
    auto probe = watch<DisconnectProbe>(node.id() + "'s disconnect of " + std::string(peer));
    const InitiationScope initiating;
    node->async_disconnect(peer, probe->handler());
    return probe;
  }

  /// Takes the next event, which must be this one.
  PeerEvent expect_event(Node& node, PeerEventKind kind, const std::string& peer) {
    const auto probe = start_wait(node, limit());
    EXPECT_FALSE(probe->error()) << probe->error().message() << ", where " << peer << " was to be " << to_string(kind);
    const PeerEvent event = std::get<1>(probe->results());
    EXPECT_EQ(to_string(event.kind), to_string(kind)) << event.peer_id << ": " << event.cause.message();
    EXPECT_EQ(event.peer_id, peer);
    EXPECT_NE(event.incarnation, 0U);
    EXPECT_EQ(event.missed, 0U);
    return event;
  }

  void expect_no_event(Node& node) {
    EXPECT_TRUE(is(start_wait(node, Milliseconds(0))->error(), condition::timed_out));
  }

  [[nodiscard]] static std::vector<std::string> ids(const Node& node) {
    std::vector<std::string> result;
    for (const PeerInfo& info : node->peers()) {
      result.push_back(info.id);
    }
    return result;
  }

  /// How an operation ends that is meant for this incarnation.
  [[nodiscard]] std::error_code error_of(TransferKind kind, Node& from, const std::string& peer, std::uint64_t incarnation) {
    const std::vector<std::uint64_t> indexes{0};
    TransferSpec spec = spec_of(kind, indexes, 1);
    spec.incarnation = incarnation;
    return start(kind, from, peer, from.objects({64}), spec)->outcome().error;
  }

 public:
  void NamesThoseThatAreConnected() {
    Node& hub = add_node();
    EXPECT_TRUE(hub->peers().empty());
    Node& first = add_node();
    Node& second = add_node({.regions = {{7, 512}}});
    connect(hub, second);
    connect(first, hub);
    expect_event(hub, PeerEventKind::connected, second.id());
    expect_event(hub, PeerEventKind::connected, first.id());
    EXPECT_EQ(ids(hub), (std::vector<std::string>{first.id(), second.id()}));
    const std::vector<PeerInfo> all = hub->peers();
    ASSERT_EQ(all.size(), 2U);
    ASSERT_EQ(all[1].regions.size(), second->regions().size());
    EXPECT_EQ(all[1].regions[0].page_size, 512U);
    const auto info = hub->peer_info(second.id());
    ASSERT_TRUE(info);
    EXPECT_EQ(all[1].incarnation, info->incarnation);
    EXPECT_EQ(all[1].init_url, info->init_url);
    EXPECT_EQ(all[1].path, info->path);
    second.destroy_channel();
    EXPECT_EQ(expect_event(hub, PeerEventKind::gone, second.id()).cause, errc::peer_closed);
    EXPECT_EQ(ids(hub), std::vector<std::string>{first.id()});
  }

  void BothSidesHearOfAConnection() {
    const auto [a, b] = pair();
    const auto at_a = start_wait(a);
    const auto at_b = start_wait(b);
    connect(a, b);
    const PeerEvent of_b = std::get<1>(at_a->results());
    const PeerEvent of_a = std::get<1>(at_b->results());
    EXPECT_EQ(of_b.peer_id, b.id());
    EXPECT_EQ(of_a.peer_id, a.id());
    EXPECT_EQ(of_b.kind, PeerEventKind::connected);
    EXPECT_EQ(of_a.kind, PeerEventKind::connected);
    EXPECT_FALSE(of_a.cause);
    const auto info = a->peer_info(b.id());
    ASSERT_TRUE(info);
    EXPECT_EQ(of_b.incarnation, info->incarnation);
    connect(a, b);  // again: nothing happens
    expect_no_event(a);
    expect_no_event(b);
  }

  void APeerThatClosesIsGone() {
    const auto [a, b] = connected_pair();
    const PeerEvent came = expect_event(a, PeerEventKind::connected, b.id());
    const auto waiting = start_wait(a);
    b.destroy_channel();
    const PeerEvent event = std::get<1>(waiting->results());
    EXPECT_EQ(event.kind, PeerEventKind::gone);
    EXPECT_EQ(event.cause, errc::peer_closed);
    EXPECT_EQ(event.incarnation, came.incarnation);
    expect_no_event(a);
  }

  void ARestartedPeerIsToldFromOneThatCameBack() {
    const auto [a, b] = connected_pair();
    const PeerEvent before = expect_event(a, PeerEventKind::connected, b.id());
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    EXPECT_EQ(expect_event(a, PeerEventKind::gone, b.id()).cause, errc::cancelled);
    connect(a, b);
    EXPECT_EQ(expect_event(a, PeerEventKind::connected, b.id()).incarnation, before.incarnation);

    b.destroy_channel();
    expect_event(a, PeerEventKind::gone, b.id());
    Node& again = add_node({.id = b.id()});
    connect(a, again);
    const PeerEvent restarted = expect_event(a, PeerEventKind::restarted, b.id());
    EXPECT_NE(restarted.incarnation, before.incarnation);
    EXPECT_EQ(restarted.cause, errc::peer_restarted);
  }

  void AnOperationMayNameTheIncarnationThatItIsMeantFor() {
    if (!capabilities().write) {
      GTEST_SKIP() << "Capabilities::write of this transport is false";
    }
    const auto [a, b] = connected_pair();
    EXPECT_NE(a->incarnation(), b->incarnation());
    const auto before = b->incarnation();
    EXPECT_EQ(a->peer_info(b.id())->incarnation, before);
    b.destroy_channel();
    Node& again = add_node({.id = b.id()});
    connect(again, a);  // so a connects to nobody, and isn't told
    const auto write = [&, a = &a](std::uint64_t incarnation) {
      return error_of(TransferKind::write, *a, again.id(), incarnation);
    };
    EXPECT_EQ(write(before), errc::peer_restarted);
    EXPECT_EQ(write(before), errc::peer_restarted) << "as often as it is asked for";
    EXPECT_FALSE(write(again->incarnation()));
    EXPECT_EQ(write(0), errc::peer_restarted) << "once, as it names none";
    EXPECT_FALSE(write(0));
    EXPECT_FALSE(write(again->incarnation()));
  }

  void TheIncarnationIsLookedAtWhereAnOperationReconnects() {
    if (!facts().reconnects) {
      GTEST_SKIP() << "the traits do not promise that operations reconnect";
    }
    const auto [a, b] = connected_pair();
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      const auto before = b->incarnation();
      a->disconnect(b.id());
      EXPECT_EQ(error_of(kind, a, b.id(), before ^ 1), errc::peer_restarted);
      a->disconnect(b.id());
      if (is_one_sided(kind)) {
        EXPECT_FALSE(error_of(kind, a, b.id(), before));
      }
    }
  }

  void EventsBeyondTheBoundAreCounted() {
    NodeSpec spec;
    spec.options.max_pending_peer_events = 2;
    Node& hub = add_node(std::move(spec));
    for (int i = 0; i < 5; ++i) {
      Node& peer = add_node({.id = "peer-" + std::to_string(i)});
      connect(hub, peer);
    }
    const PeerEvent event = std::get<1>(start_wait(hub, limit())->results());
    EXPECT_EQ(event.peer_id, "peer-3");
    EXPECT_EQ(event.missed, 3U);
    expect_event(hub, PeerEventKind::connected, "peer-4");
    expect_no_event(hub);
    EXPECT_EQ(hub->peers().size(), 5U);
  }

  void BlockingFormsOfWaiting() {
    const auto [a, b] = pair();
    auto waiting = aside([&, &node = a] { return node->wait_peer_event(); });
    connect(a, b);
    EXPECT_EQ(in_time(waiting).peer_id, b.id());
    std::error_code error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(b->wait_peer_event(limit(), error).peer_id, a.id());
    EXPECT_FALSE(error) << error.message();
    EXPECT_TRUE(b->wait_peer_event(Milliseconds(20), error).peer_id.empty());
    EXPECT_TRUE(is(error, condition::timed_out));
    EXPECT_THROW(b->wait_peer_event(Milliseconds(1)), TransferError);
    const auto endless = start_wait(a);
    a->close();
    EXPECT_EQ(endless->error(), errc::closed);
    EXPECT_EQ(start_wait(a)->error(), errc::closed);
  }

  void ADisconnectLooksLikeACloseToThePeer() {
    const auto [a, b] = connected_pair();
    expect_event(b, PeerEventKind::connected, a.id());
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
    EXPECT_TRUE(a->peers().empty());
    EXPECT_EQ(expect_event(b, PeerEventKind::gone, a.id()).cause, errc::peer_closed);
    EXPECT_FALSE(start_disconnect(a, b.id())->error()) << "one that isn't connected is no error";
  }

  void ADisconnectEndsThePeersOperations() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    Node& other = add_node();
    connect(a, other);
    const auto recv = start(TransferKind::recv, a, b, a.objects({64}), tagged(1));
    const auto send = start(TransferKind::send, a, b, a.objects({64}), tagged(2));
    const auto apart = start(TransferKind::recv, a, other, a.objects({64}), tagged(1));
    const auto peers = start(TransferKind::recv, b, a, b.objects({64}), tagged(3));
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    EXPECT_EQ(recv->outcome(), failed(errc::cancelled)) << recv->diagnostic();
    EXPECT_EQ(send->outcome(), failed(errc::cancelled)) << send->diagnostic();
    EXPECT_EQ(peers->outcome(), failed(errc::peer_closed)) << peers->diagnostic();
    EXPECT_FALSE(apart->ended());
    expect_usable(a, other);
  }

  void NothingLandsAfterADisconnect() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair({}, {.local_bytes = 1 << 20});
    std::vector<std::shared_ptr<Transfer>> writes;
    const Objects objects = b.objects(64, 4096).fill(1);
    const std::vector<std::uint64_t> pages = consecutive(0, 64);
    for (int i = 0; i < 20; ++i) {
      writes.push_back(start(TransferKind::write, b, a, objects, at(pages)));
    }
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    for (const auto& write : writes) {
      // One that had not been started on the connection may have made another one.
      EXPECT_TRUE(write->wait());
    }
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    fill_constant(a.region(), std::byte{0x77});
    expect_untouched_for(a, Milliseconds(50));
  }

  void OperationsConnectAnewAfterADisconnect() {
    if (!facts().reconnects) {
      GTEST_SKIP() << "transfers do not reconnect by themselves";
    }
    const auto [a, b] = connected_pair();
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    expect_usable_from(a, b);
    expect_event(a, PeerEventKind::connected, b.id());
    EXPECT_EQ(expect_event(a, PeerEventKind::gone, b.id()).cause, errc::cancelled);
    expect_event(a, PeerEventKind::connected, b.id());
    EXPECT_FALSE(start_disconnect(b, a.id())->error());
    // Until this side has noticed, what it starts meets the end of the connection.
    EXPECT_EQ(expect_event(a, PeerEventKind::gone, b.id()).cause, errc::peer_closed);
    expect_usable(a, b);
  }

  void ADisconnectMeetsAConnect() {
    Node& a = add_node();
    const SilentListener nobody;
    const auto connecting = start_connect(a, a.id(), "nobody", nobody.url());
    EXPECT_FALSE(start_disconnect(a, "nobody")->error());
    EXPECT_EQ(connecting->error(), errc::cancelled);
    // Also one that asks who answers at another url than where the peer is connected.
    Node& b = add_node();
    connect(a, b);
    const auto moving = start_connect(a, a.id(), b.id(), nobody.url());
    EXPECT_FALSE(start_disconnect(a, b.id())->error());
    EXPECT_EQ(moving->error(), errc::cancelled);
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
  }

  void FormsAndErrorsOfADisconnect() {
    const auto [a, b] = connected_pair();
    EXPECT_EQ(start_disconnect(a, "")->error(), errc::empty_peer_id);
    EXPECT_EQ(start_disconnect(a, "stranger")->error(), errc::unknown_peer);
    auto blocking = aside([&, &node = a, id = b.id()] {
      node->disconnect(id);
      std::error_code ec = std::make_error_code(std::errc::io_error);
      node->disconnect(id, ec);
      return ec;
    });
    EXPECT_FALSE(in_time(blocking));
    EXPECT_THROW(a->disconnect("stranger"), TransferError);
    a->close();
    EXPECT_EQ(start_disconnect(a, b.id())->error(), errc::closed);
  }

  void ACloseEndsADisconnectThatIsUnderWay() {
    const auto [a, b] = connected_pair({}, {.pausable = true});
    const auto recv = capabilities().send_recv ? start_any(TransferKind::recv, a, b, a.objects({64})) : nullptr;
    b.pause(limit());
    const auto disconnect = start_disconnect(a, b.id());
    a->close();
    b.resume();
    const auto error = disconnect->error();
    EXPECT_TRUE(!error || error == errc::closed) << error.message();
    if (recv) {
      EXPECT_TRUE(is(recv->outcome().error, condition::cancelled));
    }
  }

 private:
  /// Looks now and then, for what should not be there comes in its own time.
  void expect_untouched_for(Node& node, Milliseconds time) {
    const auto until = std::chrono::steady_clock::now() + time;
    do {
      ASSERT_TRUE(is_constant(node.region(), std::byte{0x77}));
    } while (std::chrono::steady_clock::now() < until);
  }
};

KVFERRY_TESTING_SUITE(PeersTest, PeersTests, NamesThoseThatAreConnected, BothSidesHearOfAConnection,
                      APeerThatClosesIsGone, ARestartedPeerIsToldFromOneThatCameBack,
                      AnOperationMayNameTheIncarnationThatItIsMeantFor, TheIncarnationIsLookedAtWhereAnOperationReconnects, EventsBeyondTheBoundAreCounted,
                      BlockingFormsOfWaiting, ADisconnectLooksLikeACloseToThePeer, ADisconnectEndsThePeersOperations,
                      NothingLandsAfterADisconnect, OperationsConnectAnewAfterADisconnect, ADisconnectMeetsAConnect,
                      FormsAndErrorsOfADisconnect, ACloseEndsADisconnectThatIsUnderWay);

}  // namespace kvferry::testing
