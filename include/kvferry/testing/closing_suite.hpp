// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <latch>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/channel_stats.hpp>
#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/stalled_peer.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// `close` and destruction while there is work: all of it ends, with `errc::closed`, and buffers are quiet.
class ClosingTests : public StalledPeerBase {
 public:
  void CloseEndsTransfersInFlight() {
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto pending = start_one_of_each(nodes);
    nodes.a->close();
    for (const auto& stalled : pending) {
      expect_ended(stalled, errc::closed, nodes.b);
    }
    expect_quiet(nodes, pending);
  }

  void DestructionEndsTransfersInFlight() {
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto pending = start_one_of_each(nodes);
    nodes.a.destroy_channel();
    for (const auto& stalled : pending) {
      expect_ended(stalled, errc::closed, nodes.b);
    }
    expect_quiet(nodes, pending);
  }

  void CloseLeavesItsRegionsQuiet() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair({.local_bytes = 1 << 20}, {.regions = {{150}}});
    std::vector<std::shared_ptr<Transfer>> writes;
    for (std::uint64_t i = 0; i < 50; ++i) {
      const Objects objects = a.objects({4096, 4096, 4096}).fill(1);
      writes.push_back(start(TransferKind::write, a, b, objects, at({3 * i, 3 * i + 1, 3 * i + 2})));
    }
    b->close();
    const MutableBuffer region = b.region();
    fill(region, 4711);
    for (const auto& write : writes) {
      const Outcome outcome = write->outcome();
      EXPECT_TRUE(!outcome.error || outcome.error == condition::retryable) << outcome;
    }
    EXPECT_TRUE(matches(region, 4711));
  }

  void CloseWakesBlockedTransfers() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64});
    const TransferSpec receiving{.peer_id = b.id(), .tag = 1};
    const TransferSpec sending{.peer_id = b.id(), .tag = 2};
    std::latch started(2);
    auto recv = aside([&, &channel = a.channel()] {
      started.count_down();
      std::error_code error;
      const std::size_t count = channel.batched_recv(objects.writable(), receiving, error);
      return Outcome{error, count};
    });
    auto send = aside([&, &channel = a.channel()] {
      started.count_down();
      try {
        return done(channel.batched_send(objects.readable(), sending));
      } catch (const TransferError& error) {
        return Outcome{error.code(), error.transferred()};
      }
    });
    started.wait();
    const auto until = std::chrono::steady_clock::now() + limit();
    const auto are_blocked = [&stats_of = a.channel()] {
      const ChannelStats stats = stats_of.stats();
      return stats.of(TransferKind::recv).in_flight() == 1 && stats.of(TransferKind::send).in_flight() == 1;
    };
    while (!are_blocked() && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
    EXPECT_TRUE(are_blocked());
    a->close();
    EXPECT_EQ(in_time(recv), failed(errc::closed));
    EXPECT_EQ(in_time(send), failed(errc::closed));
  }

  void CloseWakesBlockedReceiveNotification() {
    KVFERRY_TESTING_REQUIRE(notifications);
    Node& node = add_node();
    std::latch started(1);
    auto blocked = aside([&] {
      started.count_down();
      std::error_code error;
      const Notification notification = node->receive_notification({}, error);
      EXPECT_TRUE(notification.payload.empty());
      return error;
    });
    started.wait();
    node->close();
    EXPECT_EQ(in_time(blocked), errc::closed);
  }

  void CloseEndsPendingReceiveNotifications() {
    KVFERRY_TESTING_REQUIRE(notifications);
    Node& node = add_node();
    const auto endless = start_receive_notification(node);
    const auto limited = start_receive_notification(node, limit());
    node->close();
    EXPECT_EQ(endless->error(), errc::closed);
    EXPECT_EQ(limited->error(), errc::closed);
  }

  /// A delivered notification is acknowledged: its receiver may close at once.
  void CloseAnswersWhatWasHandedOver() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(notifications);
    for (int round = 0; round < 20; ++round) {
      const auto [a, b] = connected_pair({}, {.regions = {{4096}}});
      const std::vector<std::byte> payload(3, std::byte{1});
      const auto write = start(TransferKind::write, a, b, a.objects({4096}), notifying(payload, at({0})));
      std::error_code error;
      (void)b->receive_notification(limit(), error);
      EXPECT_EQ(error, std::error_code());
      b.destroy_channel();
      EXPECT_EQ(write->outcome(), done(1));
    }
  }

  void CloseEndsPendingHandshakes() {
    const SilentListener nobody;
    Node& node = add_node();
    const auto handshake = start_connect(node, node.id(), "nobody", nobody.url());
    const auto question = start_side_message(node, nobody.url(), SideMessage("X", {}));
    node->close();
    EXPECT_EQ(handshake->error(), errc::closed);
    EXPECT_EQ(question->error(), errc::closed);
  }

  void CloseWakesBlockedHandshake() {
    const SilentListener nobody;
    Node& node = add_node();
    std::latch started(1);
    auto blocked = aside([&, url = nobody.url()] {
      started.count_down();
      std::error_code error;
      node->lazy_init_peer_connection(node.id(), "nobody", url, {}, {}, error);
      return error;
    });
    started.wait();
    node->close();
    EXPECT_EQ(in_time(blocked), errc::closed);
  }

  void DestructionEndsEverythingPending() {
    const SilentListener nobody;
    const auto [a, b] = connected_pair();
    const auto handshake = start_connect(a, a.id(), "nobody", nobody.url());
    const auto notification = start_receive_notification(a);
    std::vector<std::shared_ptr<Transfer>> transfers;
    if (capabilities().send_recv) {
      for (std::uint64_t tag = 0; tag < 20; ++tag) {
        transfers.push_back(start(TransferKind::recv, a, b, a.objects({64}), tagged(tag)));
        transfers.push_back(start(TransferKind::send, a, b, a.objects({64}), tagged(100 + tag)));
      }
    }
    a.destroy_channel();
    EXPECT_EQ(handshake->error(), errc::closed);
    EXPECT_EQ(notification->error(), capabilities().notifications ? errc::closed : errc::not_supported);
    for (const auto& transfer : transfers) {
      EXPECT_EQ(transfer->outcome(), failed(errc::closed));
      EXPECT_TRUE(transfer->consistent());
    }
  }

  void CloseRacesWithNewOperations() {
    const std::size_t operations = 50;
    for (int round = 0; round < 20; ++round) {
      const auto [a, b] = connected_pair({}, {.regions = {{4 * operations * 2, 64}}});
      std::latch running(3);
      std::vector<std::future<void>> users;
      for (std::uint64_t user = 0; user < 2; ++user) {
        std::vector<std::pair<TransferKind, Objects>> work;
        for (std::size_t i = 0; i < operations; ++i) {
          for (const TransferKind kind : kinds()) {
            work.emplace_back(kind, a.objects({64}));
          }
        }
        users.push_back(aside([&, &from = a, &to = b, work, user] {
          running.arrive_and_wait();
          for (std::uint64_t i = 0; i < work.size(); ++i) {
            const auto& [kind, objects] = work[i];
            start(kind, from, to, objects, spec_of(kind, {work.size() * user + i}, i));
          }
        }));
      }
      running.arrive_and_wait();
      a->close();
      for (auto& user : users) {
        in_time(user);
      }
      for (const TransferKind kind : kinds()) {
        EXPECT_EQ(start_any(kind, a, b, a.objects({64}))->outcome(), failed(errc::closed));
      }
      b->close();
    }
  }

  void PeerThatCloses() {
    const auto [a, b] = connected_pair();
    std::vector<std::shared_ptr<Transfer>> transfers;
    if (capabilities().send_recv) {
      transfers.push_back(start(TransferKind::recv, a, b, a.objects({64}), tagged(1)));
      transfers.push_back(start(TransferKind::send, a, b, a.objects({64}), tagged(2)));
    }
    b->close();
    for (const auto& transfer : transfers) {
      EXPECT_TRUE(is(transfer->outcome().error, condition::peer_failed));
      EXPECT_EQ(transfer->outcome().count, 0U);
      EXPECT_TRUE(transfer->consistent());
    }
    // Whether this side has noticed or not: never a success, and never "unknown".
    for (const TransferKind kind : kinds()) {
      const Outcome outcome = start_any(kind, a, b, a.objects({64}), std::chrono::milliseconds(500))->outcome();
      EXPECT_TRUE(outcome.error == condition::peer_failed || outcome.error == condition::timed_out) << outcome;
      EXPECT_EQ(outcome.count, 0U);
    }
  }
};

KVFERRY_TESTING_SUITE(ClosingTest, ClosingTests, CloseEndsTransfersInFlight, DestructionEndsTransfersInFlight,
                      CloseLeavesItsRegionsQuiet, CloseWakesBlockedTransfers, CloseWakesBlockedReceiveNotification,
                      CloseEndsPendingReceiveNotifications, CloseAnswersWhatWasHandedOver, CloseEndsPendingHandshakes, CloseWakesBlockedHandshake,
                      DestructionEndsEverythingPending, CloseRacesWithNewOperations, PeerThatCloses);

}  // namespace kvferry::testing
