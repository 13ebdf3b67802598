// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <future>
#include <latch>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Handshakes: the connections that they make, and refusals.
class ConnectTests : public ConformanceBase {
 protected:
  void expect_connected(Node& a, Node& b) {
    EXPECT_TRUE(a->remote_xfer_handler_exists(b.id()));
    EXPECT_TRUE(b->remote_xfer_handler_exists(a.id()));
    expect_usable(a, b);
  }

  void expect_not_connected(Node& a, Node& b) {
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
    EXPECT_FALSE(b->remote_xfer_handler_exists(a.id()));
  }

  /// @return whether the later one took the other's place, as a busy machine kept that from answering within the second that it has.
  [[nodiscard]] bool refuse_later_one_of_the_same_id() {
    Node& server = add_node();
    Node& first = add_node({.id = "twin"});
    Node& second = add_node({.id = "twin"});
    connect(first, server);
    for (int i = 0; i < 3; ++i) {
      const auto asked = std::chrono::steady_clock::now();
      const std::error_code refused = start_connect(second, server)->error();
      if (!refused && std::chrono::steady_clock::now() - asked >= std::chrono::seconds(1)) {
        return true;
      }
      EXPECT_EQ(refused, errc::identity_conflict);
      expect_connected(first, server);
    }
    EXPECT_GE(server->stats().identity_conflicts, 3U);
    EXPECT_GE(second->stats().identity_conflicts, 3U);
    first.destroy_channel();
    std::error_code error;
    for (int i = 0; i < 1000; ++i) {  // until its goodbye has been heard
      error = start_connect(second, server)->error();
      if (error != errc::identity_conflict) {
        break;
      }
    }
    EXPECT_FALSE(error) << error.message();
    expect_usable_from(second, server);
    EXPECT_EQ(server->stats().peer_replacements, 1U);
    return false;
  }

 public:
  void MakesBothDirectionsUsable() {
    const auto [a, b] = pair();
    expect_not_connected(a, b);
    connect(a, b);
    expect_connected(a, b);
  }

  void AcceptingSideIsReadyAtOnce() {
    for (int i = 0; i < 20; ++i) {
      const auto [a, b] = connected_pair();
      EXPECT_TRUE(b->remote_xfer_handler_exists(a.id()));
      expect_usable_from(b, a);
    }
  }

  void WorksWithoutListenerOnOneSide() {
    const auto [a, b] = pair({.listens = false}, {});
    connect(a, b);
    expect_connected(a, b);
    EXPECT_EQ(b->peer_info(a.id()).value_or(PeerInfo{}).init_url, "");
  }

  void BlockingForms() {
    const auto [a, b] = pair();
    EXPECT_EQ(a->lazy_init_peer_connection(a.id(), b.id(), b.url()), std::nullopt);
    std::error_code error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(b->lazy_init_peer_connection(b.id(), a.id(), a.url(), {}, {}, error), std::nullopt);
    EXPECT_FALSE(error) << error.message();
    expect_connected(a, b);
  }

  void AcceptsUrlsWithoutScheme() {
    const auto [a, b] = pair();
    const std::string url = b.url();
    const std::string scheme = "tcp://";
    ASSERT_TRUE(url.starts_with(scheme)) << url;
    EXPECT_FALSE(start_connect(a, a.id(), b.id(), url.substr(scheme.size()))->error());
    expect_connected(a, b);
  }

  void DescribesThePeer() {
    const auto [a, b] = connected_pair({.regions = {{8, 4096, Access::read}}, .local_bytes = 0},
                                       {.regions = {{16, 4096}, {4, 512, Access::none}}, .local_bytes = 0});
    const auto info = a->peer_info(b.id());
    ASSERT_TRUE(info.has_value());
    EXPECT_EQ(info->id, b.id());
    EXPECT_EQ(info->init_url, b.url());
    EXPECT_FALSE(info->path.empty());
    EXPECT_EQ(info->regions,
              (std::vector<RemoteRegion>{{16 * 4096, 4096, Access::read_write}, {4 * 512, 512, Access::none, 1}}));

    const auto mirror = b->peer_info(a.id());
    ASSERT_TRUE(mirror.has_value());
    EXPECT_EQ(mirror->id, a.id());
    EXPECT_EQ(mirror->init_url, a.url());
    EXPECT_EQ(mirror->regions, (std::vector<RemoteRegion>{{8 * 4096, 4096, Access::read}}));
    EXPECT_NE(info->incarnation, mirror->incarnation);
  }

  void PeerIdsTakeAnyForm() {
    const std::string odd = "a b:c/\xc3\xa9 " + std::string(200, 'x');
    const auto [a, b] = pair({.id = "10.0.0.1:5555"}, {.id = odd});
    connect(a, b);
    expect_connected(a, b);
  }

  void IsLazy() {
    const auto [a, b] = connected_pair();
    const auto before = a->peer_info(b.id());
    for (int i = 0; i < 20; ++i) {
      connect(i % 2 == 0 ? a : b, i % 2 == 0 ? b : a);
    }
    const auto after = a->peer_info(b.id());
    ASSERT_TRUE(before && after);
    EXPECT_EQ(after->incarnation, before->incarnation);
    for (Node* node : {&a, &b}) {
      const std::vector<PeerStats> peers = (*node)->stats().peers;
      ASSERT_EQ(peers.size(), 1U);
      EXPECT_EQ(peers[0].connects, 1U) << "the connection is still the first one";
    }
    expect_connected(a, b);
  }

  void LaterOneOfTheSameIdIsRefused() {
    const auto end = std::chrono::steady_clock::now() + limit();
    while (refuse_later_one_of_the_same_id() && !HasFailure()) {
      ASSERT_LT(std::chrono::steady_clock::now(), end) << "the later one takes the other's place each time";
      drop_nodes();
    }
  }

  void PeerThatMovedIsFoundAtItsNewUrl() {
    Node& a = add_node();
    Node& before = add_node({.id = "mover"});
    Node& after = add_node({.id = "mover"});
    connect(a, before);
    const auto first = a->peer_info("mover");
    connect(a, after);
    const auto second = a->peer_info("mover");
    ASSERT_TRUE(first && second);
    EXPECT_NE(second->incarnation, first->incarnation);
    EXPECT_EQ(second->init_url, after.url());
    expect_connected(a, after);
    EXPECT_TRUE(before.untouched());
  }

  void ManyThreadsAtOnce() {
    const auto [a, b] = pair();
    std::latch ready(8);
    std::vector<std::future<std::error_code>> callers;
    for (int i = 0; i < 8; ++i) {
      callers.push_back(aside([&ready, &from = a, &to = b] {
        const std::string url = to.url();
        std::error_code error;
        ready.arrive_and_wait();
        from->lazy_init_peer_connection(from.id(), to.id(), url, {}, {}, error);
        return error;
      }));
    }
    for (auto& caller : callers) {
      const std::error_code error = in_time(caller);
      EXPECT_FALSE(error) << error.message();
    }
    expect_connected(a, b);
  }

  void BothSidesAtOnce() {
    for (int round = 0; round < 20; ++round) {
      SCOPED_TRACE(round);
      const auto [a, b] = pair();
      const std::string url = a.url();
      std::latch ready(2);
      auto other = aside([&ready, &url, &from = b, &to = a] {
        std::error_code error;
        ready.arrive_and_wait();
        from->lazy_init_peer_connection(from.id(), to.id(), url, {}, {}, error);
        return error;
      });
      ready.arrive_and_wait();
      const std::error_code error = start_connect(a, b)->error();
      EXPECT_FALSE(error) << error.message();
      const std::error_code other_error = in_time(other);
      EXPECT_FALSE(other_error) << other_error.message();
      expect_connected(a, b);
    }
  }

  void BothSidesManyTimesAtOnceAndTransfersMeanwhile() {
    const auto [a, b] = connected_pair();
    std::vector<std::shared_ptr<SideMessageProbe>> handshakes;
    for (int i = 0; i < 50; ++i) {
      handshakes.push_back(start_connect(a, b));
      handshakes.push_back(start_connect(b, a));
      if (i % 10 == 0) {
        expect_usable(a, b);
      }
    }
    for (const auto& handshake : handshakes) {
      EXPECT_FALSE(handshake->error()) << handshake->error().message();
    }
    expect_connected(a, b);
  }

  /// The rest of the first attempt ends nothing of the second one.
  void RightAfterOneThatWasGivenUp() {
    const auto [a, b] = pair();
    for (int round = 0; round < 50; ++round) {
      SCOPED_TRACE(round);
      std::error_code error;
      a->lazy_init_peer_connection(a.id(), b.id(), b.url(), {}, {.timeout = std::chrono::milliseconds(0)}, error);
      std::string why;
      a->lazy_init_peer_connection(a.id(), b.id(), b.url(), {}, {.diagnostic = &why}, error);
      ASSERT_FALSE(error) << error.message() << ": " << why;
      a->disconnect(b.id(), error);
      ASSERT_FALSE(error) << error.message();
    }
    connect(a, b);
    expect_connected(a, b);
  }

  void UnknownPeer() {
    Node& node = add_node();
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      const auto transfer = start(kind, node, "stranger", node.objects({64}), spec_of(kind, {0}));
      EXPECT_EQ(transfer->outcome(), failed(errc::unknown_peer));
      EXPECT_NE(transfer->diagnostic().find("stranger"), std::string::npos) << transfer->diagnostic();
      EXPECT_TRUE(transfer->consistent());
    }
  }

  void EmptyIds() {
    const auto [a, b] = pair();
    EXPECT_EQ(start_connect(a, a.id(), "", b.url())->error(), errc::empty_peer_id);
    EXPECT_EQ(start_connect(a, "", b.id(), b.url())->error(), errc::empty_peer_id);
    std::error_code error;
    a->lazy_init_peer_connection(a.id(), "", b.url(), {}, {}, error);
    EXPECT_EQ(error, errc::empty_peer_id);
    EXPECT_THROW(a->lazy_init_peer_connection("", b.id(), b.url()), TransferError);
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      EXPECT_EQ(start(kind, a, "", a.objects({64}))->outcome(), failed(errc::empty_peer_id));
    }
    expect_not_connected(a, b);
  }

  void IdsThatAreNone() {
    const auto [a, b] = pair();
    const std::string longest(max_peer_id_bytes, 'n');
    for (const std::string& id :
         {longest + "n", std::string(1 << 20, 'n'), std::string("\xff\xfe name"), std::string("a\0b", 3),
          std::string("a\nb"), std::string("\x7f"), std::string("\xc2\x85")}) {
      std::string diagnostic;
      EXPECT_EQ(start_connect(a, a.id(), id, b.url(), {}, {{}, &diagnostic})->error(), errc::invalid_peer_id)
          << diagnostic;
      EXPECT_LT(diagnostic.size(), 1000U);
      EXPECT_EQ(start_connect(a, id, b.id(), b.url())->error(), errc::invalid_peer_id);
    }
    expect_not_connected(a, b);
    EXPECT_EQ(start_connect(a, longest, "\xe6\x97\xa5 \"x\" {y=\\}", b.url())->error(), std::error_code());
    EXPECT_TRUE(b->peer_info(longest));
    EXPECT_FALSE(b->peer_info(longest.substr(1)));
  }

  void InvalidUrls() {
    Node& node = add_node();
    for (const char* url :
         {"", "nonsense", "tcp://", "tcp://127.0.0.1", "127.0.0.1:", "udp://127.0.0.1:5555", "http://127.0.0.1:5555",
          "tcp://127.0.0.1:65536", "tcp://127.0.0.1:12x", "tcp://[::1:5555"}) {
      SCOPED_TRACE(url);
      std::string diagnostic;
      EXPECT_EQ(start_connect(node, node.id(), "peer", url, {}, {{}, &diagnostic})->error(), errc::invalid_url);
      EXPECT_NE(diagnostic.find(url), std::string::npos) << diagnostic;
    }
    EXPECT_FALSE(node->remote_xfer_handler_exists("peer"));
  }

  void Itself() {
    Node& node = add_node();
    EXPECT_EQ(start_connect(node, node.id(), "myself", node.url())->error(), errc::self_connection);
    EXPECT_FALSE(node->remote_xfer_handler_exists("myself"));
    EXPECT_FALSE(node->remote_xfer_handler_exists(node.id()));
  }

  void NobodyThere() {
    Node& node = add_node();
    const DeafAddress nobody;
    const auto handshake =
        start_connect(node, node.id(), "nobody", nobody.url(), {}, {std::chrono::milliseconds(300), nullptr});
    const std::error_code error = handshake->error();
    EXPECT_TRUE(error == condition::timed_out || error == condition::peer_failed) << error.message();
    EXPECT_FALSE(node->remote_xfer_handler_exists("nobody"));
  }

  void PeerThatNeverAnswers() {
    const SilentListener nobody;
    Node& node = add_node();
    Node& other = add_node();
    std::string diagnostic;
    const auto handshake =
        start_connect(node, node.id(), "nobody", nobody.url(), {}, {std::chrono::milliseconds(300), &diagnostic});
    // Meanwhile nobody else has to wait.
    connect(node, other);
    expect_connected(node, other);
    EXPECT_TRUE(is(handshake->error(), condition::timed_out));
    EXPECT_NE(diagnostic.find("nobody"), std::string::npos) << diagnostic;
    EXPECT_FALSE(node->remote_xfer_handler_exists("nobody"));
  }

  void PageSizesThatMustBeEqualAndAre() {
    NodeSpec spec{.regions = {{8, 4096}}};
    spec.options.require_equal_page_sizes = true;
    const auto [a, b] = connected_pair(spec, spec);
    expect_connected(a, b);
  }

  /// Peers connect nevertheless; with `require_equal_page_sizes`, transfers by page index fail. Byte ranges:
  /// RangesTest.
  void PageSizesThatDiffer() {
    for (const bool insists : {false, true}) {
      SCOPED_TRACE(insists);
      NodeSpec a_spec{.regions = {{8, 4096}, {8, 512}}};
      NodeSpec b_spec{.regions = {{8, 512}, {8, 512}}};
      a_spec.options.require_equal_page_sizes = insists;
      b_spec.options.require_equal_page_sizes = false;
      const auto [a, b] = connected_pair(a_spec, b_spec);
      if (!insists) {
        expect_connected(a, b);
      }
      const Objects objects = a.objects({512});
      for (const TransferKind kind : kinds()) {
        if (!is_one_sided(kind)) {
          continue;
        }
        const auto transfer = start(kind, a, b, objects, at({2}));
        if (insists) {
          EXPECT_EQ(transfer->outcome(), failed(errc::page_size_mismatch));
          EXPECT_NE(transfer->diagnostic().find("4096"), std::string::npos) << transfer->diagnostic();
          EXPECT_NE(transfer->diagnostic().find("512"), std::string::npos) << transfer->diagnostic();
        } else {
          EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
        }
        EXPECT_EQ(start(kind, a, b, objects, at({7}, 1))->outcome(), done(1)) << "pages of one size";
      }
    }
  }

  void MorePeersThanAllowed() {
    NodeSpec spec;
    spec.options.max_peers = 2;
    Node& hub = add_node(spec);
    Node& first = add_node();
    Node& second = add_node();
    Node& third = add_node();
    connect(first, hub);
    connect(second, hub);
    EXPECT_EQ(start_connect(third, hub)->error(), errc::resource_limit);
    expect_not_connected(hub, third);

    // Peers that came by themselves take no room from peers that the owner names.
    Node& fourth = add_node();
    Node& fifth = add_node();
    connect(hub, third);
    connect(hub, fourth);
    EXPECT_EQ(start_connect(hub, fifth)->error(), errc::resource_limit);
    expect_not_connected(hub, fifth);
    for (Node* const node : {&first, &second, &third, &fourth}) {
      expect_connected(hub, *node);
    }
  }

  void PeersThatHaveGoneMakeRoom() {
    NodeSpec spec;
    spec.options.max_peers = 1;
    Node& hub = add_node(spec);
    for (int i = 0; i < 5; ++i) {
      Node& visitor = add_node();
      connect(visitor, hub);
      const auto unmet =
          capabilities().send_recv ? start(TransferKind::recv, hub, visitor, hub.objects({64}), tagged(1)) : nullptr;
      visitor.destroy_channel();
      if (unmet != nullptr) {
        // When it has ended, the hub has noticed.
        EXPECT_TRUE(is(unmet->outcome().error, condition::peer_failed));
      }
    }
  }
};

KVFERRY_TESTING_SUITE(ConnectTest, ConnectTests, MakesBothDirectionsUsable, AcceptingSideIsReadyAtOnce,
                      WorksWithoutListenerOnOneSide, BlockingForms, AcceptsUrlsWithoutScheme, DescribesThePeer,
                      PeerIdsTakeAnyForm, IsLazy, LaterOneOfTheSameIdIsRefused, PeerThatMovedIsFoundAtItsNewUrl,
                      ManyThreadsAtOnce, BothSidesAtOnce, BothSidesManyTimesAtOnceAndTransfersMeanwhile,
                      RightAfterOneThatWasGivenUp, UnknownPeer, EmptyIds, IdsThatAreNone, InvalidUrls, Itself,
                      NobodyThere, PeerThatNeverAnswers, PageSizesThatMustBeEqualAndAre, PageSizesThatDiffer,
                      MorePeersThanAllowed, PeersThatHaveGoneMakeRoom);

}  // namespace kvferry::testing
