// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/process_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Peers in processes of their own: transfers, sudden death, restarts, and peers that stop.
class ProcessesTests : public ProcessBase {
 protected:
  static void expect_gone(std::error_code error) {
    EXPECT_TRUE(error == condition::peer_failed || error == condition::timed_out) << error << " " << error.message();
  }

  /// Starts a process with a node, and connects, from one side or the other.
  void start_connected(PeerProcess& process, Node& node, bool peer_connects) {
    const std::string url = start_node(process, facts().listen_url);
    ASSERT_FALSE(url.empty());
    if (peer_connects) {
      ASSERT_EQ(process.ask("connect " + std::string(peer_id) + " " + node.id() + " " + node.url()), "ok");
    } else {
      ASSERT_FALSE(start_connect(node, node.id(), peer_id, url)->error());
    }
    ASSERT_TRUE(node->remote_xfer_handler_exists(peer_id));
  }

  /// After the peer's death: buffers are quiet, others are served.
  void expect_survived(Node& node, std::vector<Objects>& used) {
    for (Objects& objects : used) {
      objects.fill(4242);
    }
    Node& other = add_node();
    connect(node, other);
    expect_usable(node, other);
    for (const Objects& objects : used) {
      EXPECT_TRUE(objects.match(4242)) << "written after the end";
    }
  }

  void survive_a_death_in_the_middle(bool peer_connects) {
    Node& node = add_node(node_spec());
    PeerProcess process(limit());
    start_connected(process, node, peer_connects);
    if (HasFatalFailure()) {
      return;
    }
    std::vector<Objects> used;
    std::vector<std::shared_ptr<Transfer>> unmet;
    if (capabilities().send_recv) {
      for (const TransferKind kind : {TransferKind::send, TransferKind::recv}) {
        used.push_back(node.objects(sizes()).fill(2));
        unmet.push_back(start(kind, node, peer_id, used.back(), tagged(999)));
      }
    }
    process.tell("storm " + node.id());
    const auto storm = start_storm(node, peer_id, true, used);
    EXPECT_TRUE(storm->wait_done(10, limit()));
    EXPECT_EQ(process.next_line(), "in the middle");
    process.kill();

    const auto errors = storm->wait_failed(limit());
    EXPECT_FALSE(errors.empty()) << "some transfers with a dead peer have not ended";
    for (const std::error_code& error : errors) {
      expect_gone(error);
    }
    EXPECT_EQ(storm->surplus(), 0U);
    for (const auto& transfer : unmet) {
      EXPECT_TRUE(is(transfer->outcome().error, condition::peer_failed));
      EXPECT_EQ(transfer->outcome().count, 0U);
      EXPECT_TRUE(transfer->consistent());
    }
    expect_survived(node, used);
  }

 public:
  void TransfersWhicheverSideConnects() {
    if (serve_if_peer()) {
      return;
    }
    for (const bool peer_connects : {false, true}) {
      SCOPED_TRACE(peer_connects ? "the peer connects" : "this side connects");
      Node& node = add_node(node_spec());
      PeerProcess process(limit());
      start_connected(process, node, peer_connects);
      ASSERT_FALSE(HasFatalFailure());
      expect_transfers(node, process);
      expect_transfers_by_peer(node, process);
      EXPECT_TRUE(process.finish());
      drop_nodes();
    }
  }

  void PeerThatConnectedDiesInTheMiddle() {
    if (serve_if_peer()) {
      return;
    }
    survive_a_death_in_the_middle(true);
  }

  void PeerThatWasConnectedToDiesInTheMiddle() {
    if (serve_if_peer()) {
      return;
    }
    survive_a_death_in_the_middle(false);
  }

  void EveryRecvNoticesAtOnceThatItsPeerWasKilled() {
    if (serve_if_peer()) {
      return;
    }
    KVFERRY_TESTING_REQUIRE(send_recv);
    constexpr int peers_each = 8;
    constexpr std::uint64_t recvs_each = 8;
    constexpr std::chrono::hours much_later{1};
    Node& node = add_node({.regions = {{1}}, .local_bytes = std::size_t{1} << 20});
    std::list<PeerProcess> processes;
    std::vector<std::shared_ptr<Transfer>> recvs;
    for (const char* const name : {"first", "second", "third", "fourth"}) {
      PeerProcess& process = processes.emplace_back(limit());
      for (int i = 0; i < peers_each; ++i) {
        const std::string id = name + std::to_string(i);
        const std::string url = process.ask("extra " + id + " " + std::string(facts().listen_url));
        ASSERT_FALSE(start_connect(node, node.id(), id, url)->error()) << url;
        for (std::uint64_t tag_of_recv = 0; tag_of_recv < recvs_each; ++tag_of_recv) {
          TransferSpec spec = within(much_later, tagged(tag_of_recv));
          spec.peer_id = id;
          const Objects objects = node.objects({16});
          recvs.push_back(watch<Transfer>("recv of " + id, objects.count()));
          node->async_transfer(BaseTransferChannel::make_request(TransferKind::recv, objects.writable(), spec),
                               recvs.back()->handler());
        }
      }
    }
    for (PeerProcess& process : processes) {
      process.kill();
    }
    for (const auto& recv : recvs) {
      EXPECT_TRUE(is(recv->outcome().error, condition::peer_failed));
    }
  }

  void PeerDiesWithEverythingHalfOnTheWire() {
    if (serve_if_peer()) {
      return;
    }
    Node& node = add_node(node_spec());
    PeerProcess process(limit());
    start_connected(process, node, false);
    ASSERT_FALSE(HasFatalFailure());
    process.stop();
    std::vector<Objects> used;
    std::vector<std::shared_ptr<Transfer>> transfers;
    const std::vector<std::uint64_t> indexes = consecutive(0, 16);
    for (const TransferKind kind : kinds()) {
      used.push_back(node.objects(16, page_size).fill(3));
      transfers.push_back(start(kind, node, peer_id, used.back(), spec_of(kind, indexes, 1)));
    }
    process.kill();
    for (const auto& transfer : transfers) {
      const Outcome outcome = transfer->outcome();
      EXPECT_TRUE(!outcome.error || outcome.error == condition::peer_failed || outcome.error == condition::timed_out)
          << outcome;
      EXPECT_TRUE(transfer->consistent());
    }
    expect_survived(node, used);
  }

  void PeerDiesWhileIdle() {
    if (serve_if_peer()) {
      return;
    }
    Node& node = add_node(node_spec());
    PeerProcess process(limit());
    start_connected(process, node, false);
    ASSERT_FALSE(HasFatalFailure());
    process.kill();
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      const std::vector<std::uint64_t> indexes{0};
      const auto transfer = start(kind, node, peer_id, node.objects({64}),
                                  within(std::chrono::milliseconds(500), spec_of(kind, indexes, 1)));
      expect_gone(transfer->outcome().error);
      EXPECT_EQ(transfer->outcome().count, 0U);
    }
    std::vector<Objects> none;
    expect_survived(node, none);
  }

  void PeerEndsInOrder() {
    if (serve_if_peer()) {
      return;
    }
    KVFERRY_TESTING_REQUIRE(send_recv);
    Node& node = add_node(node_spec());
    PeerProcess process(limit());
    start_connected(process, node, true);
    ASSERT_FALSE(HasFatalFailure());
    const auto receiving = start(TransferKind::recv, node, peer_id, node.objects({64}), tagged(1));
    EXPECT_EQ(process.ask("close"), "ok");
    EXPECT_TRUE(is(receiving->outcome().error, condition::peer_failed));
    EXPECT_TRUE(process.finish());
  }

  void PeerStopsBeyondTheDeadline() {
    if (serve_if_peer()) {
      return;
    }
    Node& node = add_node(node_spec());
    PeerProcess process(limit());
    start_connected(process, node, false);
    ASSERT_FALSE(HasFatalFailure());
    const std::string url = node->peer_info(peer_id).value_or(PeerInfo{}).init_url;
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      node.reuse_local_memory();
      process.stop();
      Objects objects = node.objects(16, page_size).fill(4);
      const std::vector<std::uint64_t> indexes = consecutive(0, 16);
      const auto transfer =
          start(kind, node, peer_id, objects, within(std::chrono::milliseconds(200), spec_of(kind, indexes, 1)));
      const Outcome outcome = transfer->outcome();
      EXPECT_TRUE(outcome == done(16) || outcome.error == condition::timed_out) << outcome;
      EXPECT_TRUE(transfer->consistent());
      objects.fill(4242);
      process.resume();
      // The connection may have been given up meanwhile, to free the buffers.
      EXPECT_FALSE(start_connect(node, node.id(), peer_id, url)->error());
      expect_transfers(node, process);
      EXPECT_TRUE(objects.match(4242)) << "written after the end";
    }
    EXPECT_TRUE(process.finish());
  }

  void RestartedPeerIsRecognised() {
    if (serve_if_peer()) {
      return;
    }
    KVFERRY_TESTING_REQUIRE(write);
    for (const bool acknowledged : {true, false}) {
      SCOPED_TRACE(acknowledged ? "connected to again" : "reached again by a transfer");
      if (!acknowledged && !facts().reconnects) {
        continue;
      }
      // Another process may take the address between the two lives of the peer: then all is done again.
      for (int attempt = 0; attempt < 5; ++attempt) {
        drop_nodes();
        Node& node = add_node(node_spec());
        PeerProcess first(limit());
        start_connected(first, node, false);
        ASSERT_FALSE(HasFatalFailure());
        const PeerInfo before = node->peer_info(peer_id).value_or(PeerInfo{});
        const auto unmet = capabilities().send_recv
                               ? start(TransferKind::recv, node, peer_id, node.objects({64}), tagged(999))
                               : nullptr;
        first.kill();
        if (unmet != nullptr) {
          // When it has ended, the death has been noticed.
          EXPECT_TRUE(is(unmet->outcome().error, condition::peer_failed));
        }
        PeerProcess second(limit());
        if (start_node(second, before.init_url).empty()) {
          continue;
        }
        int restarts_reported = 0;
        if (acknowledged) {
          // Where the death has not been noticed, the peer still counts as connected.
          for (int i = 0; i < 10 && node->peer_info(peer_id).value_or(before).incarnation == before.incarnation; ++i) {
            EXPECT_FALSE(start_connect(node, node.id(), peer_id, before.init_url)->error());
          }
        }
        Outcome outcome;
        for (int i = 0; i < 10; ++i) {
          const auto transfer = start(TransferKind::write, node, peer_id, node.objects({64}).fill(5), at({0}));
          outcome = transfer->outcome();
          if (outcome == done(1)) {
            break;
          }
          EXPECT_TRUE(is(outcome.error, condition::peer_failed));
          restarts_reported += outcome.error == errc::peer_restarted ? 1 : 0;
        }
        EXPECT_EQ(outcome, done(1));
        EXPECT_EQ(restarts_reported, acknowledged ? 0 : 1);
        EXPECT_NE(node->peer_info(peer_id).value_or(before).incarnation, before.incarnation);
        expect_transfers(node, second);
        EXPECT_TRUE(second.finish());
        break;
      }
    }
  }
};

KVFERRY_TESTING_SUITE(ProcessesTest, ProcessesTests, TransfersWhicheverSideConnects, PeerThatConnectedDiesInTheMiddle,
                      PeerThatWasConnectedToDiesInTheMiddle, EveryRecvNoticesAtOnceThatItsPeerWasKilled, PeerDiesWithEverythingHalfOnTheWire, PeerDiesWhileIdle,
                      PeerEndsInOrder, PeerStopsBeyondTheDeadline, RestartedPeerIsRecognised);

}  // namespace kvferry::testing
