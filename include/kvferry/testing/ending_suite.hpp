// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/stalled_peer.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// After an operation's end nothing of it lands, or its error says that bytes may land; and a fence makes sure of that.
class EndingTests : public StalledPeerBase {
 protected:
  static constexpr TransferKind write = TransferKind::write;
  static constexpr std::chrono::milliseconds soon{50};

  /// The content of the first pages of a node's region.
  [[nodiscard]] static std::vector<std::byte> pages_of(const Node& node, std::size_t count = big_pages) {
    const UnwatchedAccess unwatched;
    std::vector<std::byte> bytes;
    bytes.reserve(count * big_page);
    for (std::size_t i = 0; i < count; ++i) {
      const MutableBuffer page(node.page(i));
      bytes.insert(bytes.end(), page.begin(), page.end());
    }
    return bytes;
  }

  /// Objects for all pages that a stalled write goes to, each of one value.
  [[nodiscard]] static Objects constant_objects(Node& node, std::byte value) {
    const Objects objects = node.objects(big_pages, big_page);
    for (std::size_t i = 0; i < objects.count(); ++i) {
      fill_constant(objects[i], value);
    }
    return objects;
  }

  [[nodiscard]] static ::testing::AssertionResult all_pages_are(const Node& node, std::byte value) {
    for (std::size_t i = 0; i < big_pages; ++i) {
      if (auto result = is_constant(node.page(i), value); !result) {
        return result << " (page " << i << ")";
      }
    }
    return ::testing::AssertionSuccess();
  }

  /// A stalled peer's memory may be within reach without the peer. An operation that says so has all of its bytes there.
  static void expect_done_if_said(const Outcome& outcome, const Node& peer) {
    if (!outcome.error) {
      const UnwatchedAccess unwatched;
      EXPECT_TRUE(all_pages_are(peer, std::byte{0xaa})) << "said to be done";
    }
  }

 public:
  void AWriteThatTimedOutDoesNotLandOverALaterOne() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto given_up = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}), soon);
    (void)given_up->outcome();
    nodes.b.resume();
    connect(nodes.a, nodes.b);
    const auto anew = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xbb}));
    ASSERT_EQ(anew->outcome(), done(big_pages)) << anew->diagnostic();
    EXPECT_TRUE(all_pages_are(nodes.b, std::byte{0xbb}));
    // More than was on its way has come through behind it, and then nothing of it is left.
    expect_usable(nodes.a, nodes.b);
    nodes.a.destroy_channel();
    nodes.b.destroy_channel();
    EXPECT_TRUE(all_pages_are(nodes.b, std::byte{0xbb})) << "overwritten by what had ended before";
  }

  void AWriteThatTimedOutSaysWhetherItMayStillLand() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto given_up = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}), soon);
    const Outcome outcome = given_up->outcome();
    const auto at_the_end = pages_of(nodes.b);
    expect_done_if_said(outcome, nodes.b);
    nodes.b.resume();
    connect(nodes.a, nodes.b);
    expect_usable(nodes.a, nodes.b);
    nodes.b.destroy_channel();
    if (outcome.error != condition::may_still_land) {
      EXPECT_TRUE(pages_of(nodes.b) == at_the_end) << "changed after the end, with " << outcome;
    }
  }

  void AWriteToAPeerThatWasReplacedSaysWhetherItMayStillLand() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    Node& other = add_node({.regions = {{2 * big_pages, big_page}}, .local_bytes = big_page});
    nodes.b.pause(limit());
    const auto replaced = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}));
    ASSERT_FALSE(start_connect(nodes.a, nodes.a.id(), nodes.b.id(), other.url())->error());
    const Outcome outcome = replaced->outcome();
    const auto at_the_end = pages_of(nodes.b);
    expect_done_if_said(outcome, nodes.b);
    nodes.b.resume();
    nodes.b->fence(nodes.a.id());
    nodes.b.destroy_channel();
    if (outcome.error != condition::may_still_land) {
      EXPECT_TRUE(pages_of(nodes.b) == at_the_end) << "changed after the end, with " << outcome;
    }
  }

  void ACloseSaysWhatMayStillLand() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto given_up = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}));
    nodes.a->close();
    const Outcome outcome = given_up->outcome();
    const auto at_the_end = pages_of(nodes.b);
    expect_done_if_said(outcome, nodes.b);
    EXPECT_TRUE(!outcome.error || outcome.error == errc::closed || outcome.error == errc::closed_in_flight) << outcome;
    nodes.b.resume();
    nodes.b->fence(nodes.a.id());
    nodes.b.destroy_channel();
    if (outcome.error != condition::may_still_land) {
      EXPECT_TRUE(pages_of(nodes.b) == at_the_end) << "changed after the end, with " << outcome;
    }
  }

  void AfterAFenceNothingLandsOfWhatHadFailed() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto given_up = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}), soon);
    (void)given_up->outcome();
    nodes.b.resume();
    nodes.b->fence(nodes.a.id());
    const auto fenced = pages_of(nodes.b);
    connect(nodes.a, nodes.b);
    expect_usable(nodes.a, nodes.b);
    nodes.b.destroy_channel();
    EXPECT_TRUE(pages_of(nodes.b) == fenced);
  }

  void AFenceWaitsForWhatIsUnderWay() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    const Objects objects = constant_objects(nodes.a, std::byte{1});
    for (int round = 0; round < 5; ++round) {
      const auto under_way = start_any(write, nodes.a, nodes.b, objects);
      std::error_code error;
      nodes.b->fence(nodes.a.id(), limit(), error);
      ASSERT_FALSE(error) << error.message();
      const auto fenced = pages_of(nodes.b);
      (void)under_way->outcome();
      EXPECT_TRUE(pages_of(nodes.b) == fenced) << "landed after the fence";
      for (std::size_t i = 0; i < big_pages; ++i) {
        fill_constant(nodes.b.page(i), background);
      }
      connect(nodes.a, nodes.b);  // a transport may have had to break the connection
    }
  }

  void AFenceCoversWhatWaitsForAConnection() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const auto given_up = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{1}), soon);
    (void)given_up->outcome();  // a transport may have had to break the connection
    const auto started = start_any(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{2}));
    auto fence = nodes.b->async_fence(nodes.a.id(), limit(), asio::use_future);
    nodes.b.resume();
    ASSERT_EQ(fence.wait_for(limit()), std::future_status::ready);
    EXPECT_NO_THROW(fence.get());
    const auto fenced = pages_of(nodes.b);
    (void)started->outcome();
    EXPECT_TRUE(pages_of(nodes.b) == fenced) << "landed after the fence";
  }

  void AFenceOfNobodyReturns() {
    Node& node = add_node();
    std::error_code error;
    node->fence("nobody", {}, error);
    EXPECT_FALSE(error) << error.message();
    node->fence("", {}, error);
    EXPECT_EQ(error, errc::empty_peer_id);
    node->close();
    node->fence("nobody", {}, error);
    EXPECT_EQ(error, errc::closed);
  }

  void OfObjectsForOnePageTheLastWins() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto nodes = pair_with_pausable_peer();
    const Objects objects = nodes.a.objects(big_pages, big_page);
    for (std::size_t i = 0; i < objects.count(); ++i) {
      fill_constant(objects[i], static_cast<std::byte>(i + 1));
    }
    const std::vector<std::uint64_t> same(big_pages, 3);
    for (int round = 0; round < 5; ++round) {
      ASSERT_EQ(start(write, nodes.a, nodes.b, objects, at(same))->outcome(), done(big_pages));
      EXPECT_TRUE(is_constant(nodes.b.page(3), static_cast<std::byte>(big_pages)));
      fill_constant(nodes.b.page(3), background);
    }
  }

  void OfPagesForOneBufferTheLastWins() {
    KVFERRY_TESTING_REQUIRE(read);
    const auto nodes = pair_with_pausable_peer();
    for (std::size_t i = 0; i < big_pages; ++i) {
      fill_constant(nodes.b.page(i), static_cast<std::byte>(i + 1));
    }
    const Objects one = nodes.a.objects({big_page});
    const std::vector<MutableBuffer> same(big_pages, one[0]);
    const std::vector<std::uint64_t> indexes = consecutive(0, big_pages);
    TransferSpec spec = at(indexes);
    spec.peer_id = nodes.b.id();
    EXPECT_EQ(nodes.a->batched_read(same, spec), big_pages);
    EXPECT_TRUE(is_constant(one[0], static_cast<std::byte>(big_pages)));
  }

  void NoNotificationFollowsTheEndOfItsWrite() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto nodes = pair_with_pausable_peer();
    nodes.b.pause(limit());
    const std::vector<std::uint64_t> indexes = consecutive(0, big_pages);
    const std::vector<std::byte> payload{std::byte{1}};
    const auto given_up = start(write, nodes.a, nodes.b, constant_objects(nodes.a, std::byte{0xaa}),
                                within(soon, notifying(payload, at(indexes))));
    const Outcome outcome = given_up->outcome();
    nodes.b.resume();
    nodes.b->fence(nodes.a.id());
    connect(nodes.a, nodes.b);
    const std::vector<std::byte> later{std::byte{2}};
    ASSERT_EQ(start(write, nodes.a, nodes.b, nodes.a.objects({64}), notifying(later, at({0})))->outcome(), done(1));
    if (outcome.error && outcome.error != condition::may_still_land) {
      EXPECT_EQ(std::get<1>(start_receive_notification(nodes.b)->results()).payload, later);
    }
  }
};

KVFERRY_TESTING_SUITE(EndingTest, EndingTests, AWriteThatTimedOutDoesNotLandOverALaterOne,
                      AWriteThatTimedOutSaysWhetherItMayStillLand,
                      AWriteToAPeerThatWasReplacedSaysWhetherItMayStillLand, ACloseSaysWhatMayStillLand,
                      AfterAFenceNothingLandsOfWhatHadFailed, AFenceWaitsForWhatIsUnderWay,
                      AFenceCoversWhatWaitsForAConnection, AFenceOfNobodyReturns, OfObjectsForOnePageTheLastWins,
                      OfPagesForOneBufferTheLastWins, NoNotificationFollowsTheEndOfItsWrite);

}  // namespace kvferry::testing
