// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Sends meet recvs by tag: the n-th send of a tag the n-th recv of it, whatever else is under way.
class OrderingTests : public ConformanceBase {
 protected:
  static constexpr TransferKind send = TransferKind::send;
  static constexpr TransferKind recv = TransferKind::recv;

  struct Expected {
    std::shared_ptr<Transfer> transfer;
    Objects target;
    std::uint64_t seed;
  };

  static void expect_all(const std::vector<Expected>& all) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      SCOPED_TRACE(i);
      EXPECT_EQ(all[i].transfer->outcome(), done(all[i].target.count())) << all[i].transfer->diagnostic();
      EXPECT_TRUE(all[i].target.match(all[i].seed));
    }
  }

  /// Starts a send of one object with this seed.
  void start_send(Node& from, Node& to, std::uint64_t tag, std::uint64_t seed, std::size_t size = 64) {
    sends_.push_back(start(send, from, to, from.objects({size}).fill(seed), tagged(tag)));
  }
  /// Starts a recv that is to get this seed.
  [[nodiscard]] Expected start_recv(Node& to, Node& from, std::uint64_t tag, std::uint64_t seed,
                                    std::size_t size = 64) {
    const Objects target = to.objects({size});
    return {start(recv, to, from, target, tagged(tag)), target, seed};
  }

  void expect_sends_done() {
    for (const auto& transfer : sends_) {
      EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
    }
  }

 public:
  void SameTagRecvsFirst() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::vector<Expected> recvs;
    for (std::uint64_t i = 0; i < 100; ++i) {
      recvs.push_back(start_recv(b, a, 7, i));
    }
    for (std::uint64_t i = 0; i < 100; ++i) {
      start_send(a, b, 7, i);
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void SameTagSendsFirst() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::vector<Expected> recvs;
    for (std::uint64_t i = 0; i < 100; ++i) {
      start_send(a, b, 7, i);
    }
    for (std::uint64_t i = 0; i < 100; ++i) {
      recvs.push_back(start_recv(b, a, 7, i));
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void SameTagOfAnySize() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const NodeSpec spec{.regions = {}, .local_bytes = 20 << 20};
    const auto [a, b] = connected_pair(spec, spec);
    // Large ones are overtaken by small ones if order is left to the connection.
    const std::vector<std::size_t> sizes{6 << 20, 1, 0, 70'000, 5 << 20, 300, 1 << 20, 2};
    std::vector<Expected> recvs;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      start_send(a, b, 7, i, sizes[i]);
      recvs.push_back(start_recv(b, a, 7, i, sizes[i]));
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void DifferentTagsOutOfOrder() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::vector<Expected> recvs;
    for (std::uint64_t tag = 0; tag < 100; ++tag) {
      start_send(a, b, tag, 1000 + tag);
    }
    for (std::uint64_t i = 0; i < 100; ++i) {
      const std::uint64_t tag = (i * 37 + 99) % 100;
      recvs.push_back(start_recv(b, a, tag, 1000 + tag));
      EXPECT_EQ(recvs.back().transfer->outcome(), done(1));
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void AnyTagIsATag() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> tags{
        0, 1, std::numeric_limits<std::uint64_t>::max(), std::uint64_t{1} << 63, std::uint64_t{1} << 32, 0xffff'ffff};
    std::vector<Expected> recvs;
    for (const std::uint64_t tag : tags) {
      recvs.push_back(start_recv(b, a, tag, tag));
    }
    for (auto tag = tags.rbegin(); tag != tags.rend(); ++tag) {
      start_send(a, b, *tag, *tag);
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void SendWithoutRecvHoldsNothingUp() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const NodeSpec spec{.regions = {}, .local_bytes = 20 << 20};
    const auto [a, b] = connected_pair(spec, spec);
    const std::size_t large = 8 << 20;
    const auto unmet = start(send, a, b, a.objects({large}).fill(1), tagged(1));
    std::vector<Expected> recvs;
    for (std::uint64_t i = 0; i < 20; ++i) {
      start_send(a, b, 2, i);
      recvs.push_back(start_recv(b, a, 2, i));
    }
    expect_all(recvs);
    expect_sends_done();
    EXPECT_FALSE(unmet->ended());
    const auto met = start_recv(b, a, 1, 1, large);
    expect_all({met});
    EXPECT_EQ(unmet->outcome(), done(1));
  }

  void BothDirectionsAtOnce() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const NodeSpec spec{.regions = {}, .local_bytes = 20 << 20};
    const auto [a, b] = connected_pair(spec, spec);
    std::vector<Expected> recvs;
    const std::size_t size = 200'000;
    for (std::uint64_t i = 0; i < 40; ++i) {
      start_send(a, b, 7, i, size);
      start_send(b, a, 7, 500 + i, size);
      recvs.push_back(start_recv(b, a, 7, i, size));
      recvs.push_back(start_recv(a, b, 7, 500 + i, size));
    }
    expect_all(recvs);
    expect_sends_done();
  }

  void PeersAreKeptApart() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    Node& hub = add_node();
    Node& first = add_node();
    Node& second = add_node();
    connect(first, hub);
    connect(hub, second);
    std::vector<Expected> recvs;
    for (std::uint64_t i = 0; i < 20; ++i) {
      recvs.push_back(start_recv(hub, first, 7, i));
    }
    for (std::uint64_t i = 0; i < 20; ++i) {
      start_send(second, hub, 7, 500 + i);
    }
    for (std::uint64_t i = 0; i < 20; ++i) {
      start_send(first, hub, 7, i);
      recvs.push_back(start_recv(hub, second, 7, 500 + i));
    }
    expect_all(recvs);
    expect_sends_done();
  }

 private:
  std::vector<std::shared_ptr<Transfer>> sends_;
};

KVFERRY_TESTING_SUITE(OrderingTest, OrderingTests, SameTagRecvsFirst, SameTagSendsFirst, SameTagOfAnySize,
                      DifferentTagsOutOfOrder, AnyTagIsATag, SendWithoutRecvHoldsNothingUp, BothDirectionsAtOnce,
                      PeersAreKeptApart);

}  // namespace kvferry::testing
