// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <future>
#include <iterator>
#include <latch>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Many threads on one channel, many peers, and peers that come and go.
class ConcurrencyTests : public ConformanceBase {
 protected:
  [[nodiscard]] static std::ptrdiff_t thread_count() {
    return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
  }

  /// The work of one thread, on its own pages, tags and buffers: blocking calls of all kinds.
  struct Worker {
    BaseTransferChannel& from;
    BaseTransferChannel& to;
    std::string from_id;
    std::string to_id;
    Objects source;
    Objects target;
    Objects arrival;
    std::vector<std::uint64_t> pages;
    std::uint64_t tag;
  };

  [[nodiscard]] Worker make_worker(Node& from, Node& to, std::uint64_t number) {
    return {from.channel(),
            to.channel(),
            from.id(),
            to.id(),
            from.objects({200, 64, 1}).fill(100 * number),
            from.objects({200, 64, 1}),
            to.objects({200, 64, 1}),
            {3 * number, 3 * number + 1, 3 * number + 2},
            number};
  }

  void work(Worker& worker, int rounds) {
    for (int round = 0; round < rounds; ++round) {
      worker.source.fill(worker.tag * 1000 + static_cast<std::uint64_t>(round));
      TransferSpec spec = at(worker.pages);
      spec.peer_id = worker.to_id;
      if (capabilities().write) {
        ASSERT_EQ(worker.from.batched_write(worker.source.readable(), spec), 3U);
      }
      if (capabilities().write && capabilities().read) {
        ASSERT_EQ(worker.from.batched_read(worker.target.writable(), spec), 3U);
        ASSERT_TRUE(worker.target.match(worker.tag * 1000 + static_cast<std::uint64_t>(round)));
      }
      if (capabilities().send_recv) {
        auto receiving = worker.to.async_batched_recv(worker.arrival.writable(),
                                                      {.peer_id = worker.from_id, .tag = worker.tag}, asio::use_future);
        ASSERT_EQ(worker.from.batched_send(worker.source.readable(), {.peer_id = worker.to_id, .tag = worker.tag}), 3U);
        ASSERT_EQ(in_time(receiving), 3U);
        ASSERT_TRUE(worker.arrival.match(worker.tag * 1000 + static_cast<std::uint64_t>(round)));
      }
    }
  }

 public:
  void ManyThreadsOnOneChannel() {
    const auto [a, b] = connected_pair();
    std::vector<Worker> workers;
    for (std::uint64_t i = 0; i < 8; ++i) {
      workers.push_back(i % 2 == 0 ? make_worker(a, b, i) : make_worker(b, a, i));
    }
    std::latch ready(8);
    std::vector<std::future<void>> threads;
    for (auto& worker : workers) {
      threads.push_back(aside([this, &ready, &worker] {
        ready.arrive_and_wait();
        work(worker, 30);
      }));
    }
    for (auto& thread : threads) {
      in_time(thread);
    }
    expect_usable(a, b);
  }

  void ManyPeers() {
    const std::size_t count = 20;
    // After this the channels have started all that they start late.
    Node& first_hub = add_node();
    std::vector<Node*> peers;
    for (std::size_t i = 0; i < count; ++i) {
      peers.push_back(&add_node());
      connect(*peers.back(), first_hub);
      expect_usable(*peers.back(), first_hub);
    }
    Node& hub = add_node();
    const std::ptrdiff_t threads_before = thread_count();
    for (std::size_t i = 0; i < count; ++i) {
      i % 2 == 0 ? connect(*peers[i], hub) : connect(hub, *peers[i]);
    }
    for (Node* peer : peers) {
      EXPECT_TRUE(hub->remote_xfer_handler_exists(peer->id()));
      expect_usable(*peer, hub);
    }
    EXPECT_LT(thread_count() - threads_before, 10) << "threads for " << count << " more peers of one channel";
  }

  void ManyPeersAtOnce() {
    Node& hub = add_node({.regions = {{20}}});
    std::vector<Node*> peers;
    for (int i = 0; i < 20; ++i) {
      peers.push_back(&add_node({.regions = {{20}}}));
    }
    std::vector<std::shared_ptr<SideMessageProbe>> handshakes;
    for (std::size_t i = 0; i < peers.size(); ++i) {
      handshakes.push_back(i % 2 == 0 ? start_connect(*peers[i], hub) : start_connect(hub, *peers[i]));
    }
    for (const auto& handshake : handshakes) {
      EXPECT_FALSE(handshake->error()) << handshake->error().message();
    }
    std::vector<std::shared_ptr<Transfer>> transfers;
    for (std::uint64_t i = 0; i < peers.size(); ++i) {
      if (capabilities().write) {
        transfers.push_back(start(TransferKind::write, *peers[i], hub, peers[i]->objects({4096}).fill(i), at({i})));
      }
      if (capabilities().send_recv) {
        transfers.push_back(start(TransferKind::recv, hub, *peers[i], hub.objects({100}), tagged(1)));
        transfers.push_back(start(TransferKind::send, *peers[i], hub, peers[i]->objects({100}), tagged(1)));
      }
    }
    for (const auto& transfer : transfers) {
      EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
    }
    for (std::uint64_t i = 0; capabilities().write && i < peers.size(); ++i) {
      EXPECT_TRUE(matches(hub.page(i), i));
    }
  }

  void PeersThatComeAndGoDisturbNobody() {
    const auto [a, b] = connected_pair();
    auto worker = make_worker(a, b, 1);
    auto steady = aside([this, &worker] { work(worker, 100); });
    for (int i = 0; i < 10; ++i) {
      Node& visitor = add_node();
      connect(visitor, b);
      if (i % 2 == 0) {
        connect(a, visitor);
      }
      const auto transfer =
          capabilities().send_recv ? start(TransferKind::recv, b, visitor, b.objects({64}), tagged(9)) : nullptr;
      visitor.destroy_channel();
      if (transfer != nullptr) {
        EXPECT_TRUE(is(transfer->outcome().error, condition::peer_failed));
      }
    }
    in_time(steady);
    expect_usable(a, b);
  }

  void SameIdAgainAfterThePeerHasGone() {
    Node& hub = add_node();
    for (int i = 0; i < 5; ++i) {
      Node& visitor = add_node({.id = "visitor"});
      connect(visitor, hub);
      EXPECT_TRUE(hub->remote_xfer_handler_exists("visitor"));
      expect_usable_from(visitor, hub);
      // To the hub it is a peer that restarted; this says that it knows.
      connect(hub, visitor);
      expect_usable_from(hub, visitor);
      visitor.destroy_channel();
    }
  }

  void RestartedPeerIsReachedAgain() {
    Node& a = add_node();
    Node& old = add_node({.id = "phoenix"});
    connect(a, old);
    const std::uint64_t incarnation = a->peer_info("phoenix").value_or(PeerInfo{}).incarnation;
    const std::string url = old.url();
    old.destroy_channel();
    Node& reborn = add_node({.id = "phoenix", .init_url = url});
    ASSERT_EQ(reborn.url(), url);
    // The stale connection may not have been noticed yet, and then the call finds it usable: only the next one must
    // not.
    std::error_code error;
    for (int attempt = 0; attempt < 5; ++attempt) {
      connect(a, reborn);
      const auto info = a->peer_info("phoenix");
      if (info && info->incarnation != incarnation) {
        break;
      }
      error = start_any(kinds().front(), a, reborn, a.objects({64}), std::chrono::milliseconds(200))->outcome().error;
      EXPECT_TRUE(is(error, condition::peer_failed) || is(error, condition::timed_out)) << error.message();
    }
    EXPECT_NE(a->peer_info("phoenix").value_or(PeerInfo{}).incarnation, incarnation);
    expect_usable(a, reborn);
  }
};

KVFERRY_TESTING_SUITE(ConcurrencyTest, ConcurrencyTests, ManyThreadsOnOneChannel, ManyPeers, ManyPeersAtOnce,
                      PeersThatComeAndGoDisturbNobody, SameIdAgainAfterThePeerHasGone, RestartedPeerIsReachedAgain);

}  // namespace kvferry::testing
