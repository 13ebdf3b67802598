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

namespace kvferry::testing {

/// Many threads on one channel, many peers, and peers that come and go.
template <class Traits>
class ConcurrencyTest : public ConformanceTest<Traits> {
 protected:
  [[nodiscard]] static std::ptrdiff_t thread_count() {
    return std::distance(std::filesystem::directory_iterator("/proc/self/task"), std::filesystem::directory_iterator());
  }

  /// What one thread does with its own pages, tags and buffers: blocking calls of all kinds.
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
    return {from.channel(), to.channel(),
            from.id(),      to.id(),
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
      if (this->capabilities().write) {
        ASSERT_EQ(worker.from.batched_write(worker.source.readable(), spec), 3U);
      }
      if (this->capabilities().write && this->capabilities().read) {
        ASSERT_EQ(worker.from.batched_read(worker.target.writable(), spec), 3U);
        ASSERT_TRUE(worker.target.match(worker.tag * 1000 + static_cast<std::uint64_t>(round)));
      }
      if (this->capabilities().send_recv) {
        auto receiving = worker.to.async_batched_recv(worker.arrival.writable(),
                                                      {.peer_id = worker.from_id, .tag = worker.tag}, asio::use_future);
        ASSERT_EQ(worker.from.batched_send(worker.source.readable(), {.peer_id = worker.to_id, .tag = worker.tag}), 3U);
        ASSERT_EQ(this->in_time(receiving), 3U);
        ASSERT_TRUE(worker.arrival.match(worker.tag * 1000 + static_cast<std::uint64_t>(round)));
      }
    }
  }
};
TYPED_TEST_SUITE_P(ConcurrencyTest);

TYPED_TEST_P(ConcurrencyTest, ManyThreadsOnOneChannel) {
  const auto [a, b] = this->connected_pair();
  std::vector<typename TestFixture::Worker> workers;
  for (std::uint64_t i = 0; i < 8; ++i) {
    workers.push_back(i % 2 == 0 ? this->make_worker(a, b, i) : this->make_worker(b, a, i));
  }
  std::latch ready(8);
  std::vector<std::future<void>> threads;
  for (auto& worker : workers) {
    threads.push_back(this->aside([this, &ready, &worker] {
      ready.arrive_and_wait();
      this->work(worker, 30);
    }));
  }
  for (auto& thread : threads) {
    this->in_time(thread);
  }
  this->expect_usable(a, b);
}

TYPED_TEST_P(ConcurrencyTest, ManyPeers) {
  const std::size_t count = 20;
  // Whatever the channels start late, they have started after this.
  Node& first_hub = this->add_node();
  std::vector<Node*> peers;
  for (std::size_t i = 0; i < count; ++i) {
    peers.push_back(&this->add_node());
    this->connect(*peers.back(), first_hub);
    this->expect_usable(*peers.back(), first_hub);
  }
  Node& hub = this->add_node();
  const std::ptrdiff_t threads_before = this->thread_count();
  for (std::size_t i = 0; i < count; ++i) {
    i % 2 == 0 ? this->connect(*peers[i], hub) : this->connect(hub, *peers[i]);
  }
  for (Node* peer : peers) {
    EXPECT_TRUE(hub->remote_xfer_handler_exists(peer->id()));
    this->expect_usable(*peer, hub);
  }
  EXPECT_LT(this->thread_count() - threads_before, 10) << "threads for " << count << " more peers of one channel";
}

TYPED_TEST_P(ConcurrencyTest, ManyPeersAtOnce) {
  Node& hub = this->add_node({.regions = {{20}}});
  std::vector<Node*> peers;
  for (int i = 0; i < 20; ++i) {
    peers.push_back(&this->add_node({.regions = {{20}}}));
  }
  std::vector<std::shared_ptr<SideMessageProbe>> handshakes;
  for (std::size_t i = 0; i < peers.size(); ++i) {
    handshakes.push_back(i % 2 == 0 ? this->start_connect(*peers[i], hub) : this->start_connect(hub, *peers[i]));
  }
  for (const auto& handshake : handshakes) {
    EXPECT_FALSE(handshake->error()) << handshake->error().message();
  }
  std::vector<std::shared_ptr<Transfer>> transfers;
  for (std::uint64_t i = 0; i < peers.size(); ++i) {
    if (this->capabilities().write) {
      transfers.push_back(this->start(TransferKind::write, *peers[i], hub, peers[i]->objects({4096}).fill(i), at({i})));
    }
    if (this->capabilities().send_recv) {
      transfers.push_back(this->start(TransferKind::recv, hub, *peers[i], hub.objects({100}), tagged(1)));
      transfers.push_back(this->start(TransferKind::send, *peers[i], hub, peers[i]->objects({100}), tagged(1)));
    }
  }
  for (const auto& transfer : transfers) {
    EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
  }
  for (std::uint64_t i = 0; this->capabilities().write && i < peers.size(); ++i) {
    EXPECT_TRUE(matches(hub.page(i), i));
  }
}

TYPED_TEST_P(ConcurrencyTest, PeersThatComeAndGoDisturbNobody) {
  const auto [a, b] = this->connected_pair();
  auto worker = this->make_worker(a, b, 1);
  auto steady = this->aside([this, &worker] { this->work(worker, 100); });
  for (int i = 0; i < 10; ++i) {
    Node& visitor = this->add_node();
    this->connect(visitor, b);
    if (i % 2 == 0) {
      this->connect(a, visitor);
    }
    const auto transfer = this->capabilities().send_recv
                              ? this->start(TransferKind::recv, b, visitor, b.objects({64}), tagged(9))
                              : nullptr;
    visitor.destroy_channel();
    if (transfer != nullptr) {
      EXPECT_TRUE(is(transfer->outcome().error, condition::peer_failed));
    }
  }
  this->in_time(steady);
  this->expect_usable(a, b);
}

TYPED_TEST_P(ConcurrencyTest, SameIdAgainAfterThePeerHasGone) {
  Node& hub = this->add_node();
  for (int i = 0; i < 5; ++i) {
    Node& visitor = this->add_node({.id = "visitor"});
    this->connect(visitor, hub);
    EXPECT_TRUE(hub->remote_xfer_handler_exists("visitor"));
    this->expect_usable(visitor, hub);
    visitor.destroy_channel();
  }
}

TYPED_TEST_P(ConcurrencyTest, RestartedPeerIsReachedAgain) {
  Node& a = this->add_node();
  Node& old = this->add_node({.id = "phoenix"});
  this->connect(a, old);
  const std::uint64_t incarnation = a->peer_info("phoenix").value_or(PeerInfo{}).incarnation;
  const std::string url = old.url();
  old.destroy_channel();
  Node& reborn = this->add_node({.id = "phoenix", .init_url = url});
  ASSERT_EQ(reborn.url(), url);
  // The stale connection may not have been noticed yet, and then the call finds it usable: only the next one must not.
  std::error_code error;
  for (int attempt = 0; attempt < 5; ++attempt) {
    this->connect(a, reborn);
    if (a->peer_info("phoenix").value_or(PeerInfo{}).incarnation != incarnation) {
      break;
    }
    error = this->start_any(this->kinds().front(), a, reborn, a.objects({64}), std::chrono::milliseconds(200))->outcome().error;
    EXPECT_TRUE(is(error, condition::retryable));
  }
  EXPECT_NE(a->peer_info("phoenix").value_or(PeerInfo{}).incarnation, incarnation);
  this->expect_usable(a, reborn);
}

REGISTER_TYPED_TEST_SUITE_P(ConcurrencyTest, ManyThreadsOnOneChannel, ManyPeers, ManyPeersAtOnce,
                            PeersThatComeAndGoDisturbNobody, SameIdAgainAfterThePeerHasGone,
                            RestartedPeerIsReachedAgain);

}  // namespace kvferry::testing
