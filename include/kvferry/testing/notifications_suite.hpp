// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/bind_executor.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Notifications: handed out after the data, each once, oldest first.
class NotificationsTests : public ConformanceBase {
 protected:
  [[nodiscard]] static std::vector<std::byte> bytes(std::string_view text) {
    const auto view = std::as_bytes(std::span(text));
    return {view.begin(), view.end()};
  }

  /// Starts a write of one object to a page, with a notification.
  std::shared_ptr<Transfer> start_write(Node& from, Node& to, std::uint64_t page, std::uint64_t seed,
                                        std::string_view text) {
    const auto payload = bytes(text);
    return start(TransferKind::write, from, to, from.objects({4096}).fill(seed), notifying(payload, at({page})));
  }

  /// Waits for the next notification, which must be this one.
  void expect_next(Node& node, const Node& from, std::string_view text) {
    const auto probe = start_receive_notification(node, limit());
    ASSERT_FALSE(probe->error()) << probe->error().message();
    const Notification notification = std::get<1>(probe->results());
    EXPECT_EQ(notification.peer_id, from.id());
    const auto info = node.channel().peer_info(from.id());
    EXPECT_NE(notification.incarnation, 0U) << "a notification names the incarnation of the peer that attached it";
    if (info) {
      EXPECT_EQ(notification.incarnation, info->incarnation);
    }
    EXPECT_EQ(notification.payload, bytes(text));
  }

  void expect_none(Node& node) {
    const auto probe = start_receive_notification(node, std::chrono::milliseconds(0));
    EXPECT_TRUE(is(probe->error(), condition::timed_out));
  }

 public:
  void ArrivesAfterTheData() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair({.local_bytes = 4 << 20}, {.regions = {{128}}});
    for (std::uint64_t round = 0; round < 20; ++round) {
      a.reuse_local_memory();
      fill_constant(b.region(), background);
      const auto waiting = start_receive_notification(b, limit());
      const std::vector<std::uint64_t> indexes = consecutive(0, 128);
      const Objects objects = a.objects(128, 4096).fill(1000 * round);
      const auto payload = bytes("round");
      const auto transfer = start(TransferKind::write, a, b, objects, notifying(payload, at(indexes)));
      ASSERT_FALSE(waiting->error()) << waiting->error().message();
      for (const std::uint64_t page : indexes) {
        ASSERT_TRUE(matches(b.page(page), 1000 * round + page)) << "round " << round << ", page " << page;
      }
      EXPECT_EQ(std::get<1>(waiting->results()).payload, payload);
      EXPECT_EQ(std::get<1>(waiting->results()).peer_id, a.id());
      EXPECT_EQ(transfer->outcome(), done(128)) << transfer->diagnostic();
    }
  }

  void WaitsToBeReceived() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    EXPECT_EQ(start_write(a, b, 1, 1, "early")->outcome(), done(1));
    expect_next(b, a, "early");
    expect_none(b);
  }

  void BlockingForms() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    auto waiting = aside([&, &to = b] { return to->receive_notification(); });
    EXPECT_EQ(start_write(a, b, 1, 1, "one")->outcome(), done(1));
    EXPECT_EQ(in_time(waiting).payload, bytes("one"));

    std::error_code error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(start_write(a, b, 1, 1, "two")->outcome(), done(1));
    EXPECT_EQ(b->receive_notification(limit(), error).payload, bytes("two"));
    EXPECT_FALSE(error) << error.message();

    const Notification nothing = b->receive_notification(std::chrono::milliseconds(20), error);
    EXPECT_TRUE(is(error, condition::timed_out));
    EXPECT_TRUE(nothing.payload.empty());
    EXPECT_THROW(b->receive_notification(std::chrono::milliseconds(20)), TransferError);
  }

  void OldestFirst() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair({.local_bytes = 1 << 20}, {});
    for (std::uint64_t i = 0; i < 100; ++i) {
      ASSERT_EQ(start_write(a, b, i % 64, i, std::to_string(i))->outcome(), done(1));
    }
    for (std::uint64_t i = 0; i < 100; ++i) {
      expect_next(b, a, std::to_string(i));
    }
    expect_none(b);
  }

  void EachIsHandedOutOnce() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    std::vector<std::shared_ptr<NotificationProbe>> waiting;
    for (int i = 0; i < 10; ++i) {
      waiting.push_back(start_receive_notification(b));
    }
    for (std::uint64_t i = 0; i < 10; ++i) {
      ASSERT_EQ(start_write(a, b, i, i, std::to_string(i))->outcome(), done(1));
    }
    std::vector<std::vector<std::byte>> received;
    std::vector<std::vector<std::byte>> sent;
    for (std::size_t i = 0; i < 10; ++i) {
      EXPECT_FALSE(waiting[i]->error());
      received.push_back(std::get<1>(waiting[i]->results()).payload);
      sent.push_back(bytes(std::to_string(i)));
    }
    EXPECT_TRUE(std::ranges::is_permutation(received, sent));
    expect_none(b);
  }

  void NeedsNothingMoreOfTheInitiator() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    // Nobody runs this executor until the notification is there, so nobody on this side calls the channel again.
    asio::io_context unattended;
    const auto payload = bytes("on its own");
    const Objects objects = a.objects({4096}).fill(5);
    const auto transfer =
        start_adapted(TransferKind::write, a, b.id(), objects, notifying(payload, at({3})),
                      [&](auto handler) { return asio::bind_executor(unattended.get_executor(), std::move(handler)); });
    expect_next(b, a, "on its own");
    EXPECT_TRUE(matches(b.page(3), 5));
    EXPECT_FALSE(transfer->ended());
    unattended.run_for(limit());
    EXPECT_EQ(transfer->outcome(), done(1));
  }

  void FromEitherSideAndSeveralPeers() {
    KVFERRY_TESTING_REQUIRE(notifications);
    Node& hub = add_node();
    Node& first = add_node();
    Node& second = add_node();
    connect(first, hub);
    connect(hub, second);
    EXPECT_EQ(start_write(first, hub, 1, 1, "from first")->outcome(), done(1));
    expect_next(hub, first, "from first");
    EXPECT_EQ(start_write(second, hub, 1, 1, "from second")->outcome(), done(1));
    expect_next(hub, second, "from second");
    EXPECT_EQ(start_write(hub, first, 1, 1, "back")->outcome(), done(1));
    expect_next(first, hub, "back");
    expect_none(second);
  }

  void WritesWithoutOneAnnounceNothing() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    EXPECT_EQ(start_write(a, b, 1, 1, "")->outcome(), done(1));
    EXPECT_EQ(start_write(a, b, 64, 1, "of a refused batch")->outcome(), failed(errc::index_out_of_range));
    EXPECT_EQ(start_write(a, b, 2, 1, "the first")->outcome(), done(1));
    expect_next(b, a, "the first");
    expect_none(b);
  }

  void AnyBytesUpToTheLimit() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    const std::size_t max = capabilities().max_notification_bytes;
    const std::size_t largest = std::min(max, std::size_t{64} << 20);
    for (const std::size_t size : {std::size_t{1}, std::min(max, std::size_t{1000}), largest}) {
      std::vector<std::byte> payload(size);
      fill(payload, size);
      const auto waiting = start_receive_notification(b, limit());
      EXPECT_EQ(start(TransferKind::write, a, b, a.objects({64}), notifying(payload, at({1})))->outcome(), done(1));
      ASSERT_FALSE(waiting->error());
      EXPECT_EQ(std::get<1>(waiting->results()).payload, payload);
    }
    if (largest == max) {
      const std::vector<std::byte> payload(max + 1);
      const auto transfer = start(TransferKind::write, a, b, a.objects({64}).fill(1), notifying(payload, at({2})));
      EXPECT_EQ(transfer->outcome(), failed(errc::notification_too_large));
      EXPECT_NE(transfer->diagnostic().find(std::to_string(max)), std::string::npos) << transfer->diagnostic();
      EXPECT_NE(transfer->diagnostic().find(std::to_string(max + 1)), std::string::npos) << transfer->diagnostic();
      EXPECT_TRUE(is_constant(b.page(2), background));
      expect_none(b);
    }
  }

  void FullQueueIsReported() {
    KVFERRY_TESTING_REQUIRE(notifications);
    NodeSpec spec;
    spec.options.max_pending_notifications = 2;
    const auto [a, b] = connected_pair({}, spec);
    EXPECT_EQ(start_write(a, b, 1, 1, "one")->outcome(), done(1));
    EXPECT_EQ(start_write(a, b, 2, 2, "two")->outcome(), done(1));
    EXPECT_EQ(start_write(a, b, 3, 3, "three")->outcome().error, errc::resource_limit);
    EXPECT_TRUE(matches(b.page(3), 3)) << "the data has landed all the same";
    expect_next(b, a, "one");
    EXPECT_EQ(start_write(a, b, 4, 4, "four")->outcome(), done(1));
    expect_next(b, a, "two");
    expect_next(b, a, "four");
    expect_none(b);
  }

  void WaiterThatTimedOutTakesNothing() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    for (const int timeout : {-5, 0, 1, 20}) {
      const auto waiting = start_receive_notification(b, std::chrono::milliseconds(timeout));
      EXPECT_TRUE(is(waiting->error(), condition::timed_out));
    }
    EXPECT_EQ(start_write(a, b, 1, 1, "for the next")->outcome(), done(1));
    expect_next(b, a, "for the next");
  }

  void SurvivesItsSender() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    EXPECT_EQ(start_write(a, b, 1, 7, "last words")->outcome(), done(1));
    a.destroy_channel();
    expect_next(b, a, "last words");
    EXPECT_TRUE(matches(b.page(1), 7));
  }
};

KVFERRY_TESTING_SUITE(NotificationsTest, NotificationsTests, ArrivesAfterTheData, WaitsToBeReceived, BlockingForms,
                      OldestFirst, EachIsHandedOutOnce, NeedsNothingMoreOfTheInitiator, FromEitherSideAndSeveralPeers,
                      WritesWithoutOneAnnounceNothing, AnyBytesUpToTheLimit, FullQueueIsReported,
                      WaiterThatTimedOutTakesNothing, SurvivesItsSender);

}  // namespace kvferry::testing
