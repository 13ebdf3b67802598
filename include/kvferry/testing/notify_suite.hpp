// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Notifications alone, with reads, and several of a key.
class NotifyTests : public ConformanceBase {
 protected:
  using NotifyProbe = Probe<std::error_code>;
  using NotificationsProbe = Probe<std::error_code, std::vector<Notification>>;

  [[nodiscard]] static std::vector<std::byte> bytes(std::string_view text) {
    const auto view = std::as_bytes(std::span(text));
    return {view.begin(), view.end()};
  }
  [[nodiscard]] static std::vector<std::string> texts(const std::vector<Notification>& notifications) {
    std::vector<std::string> result;
    for (const Notification& notification : notifications) {
      const auto* const text = reinterpret_cast<const char*>(notification.payload.data());
      result.emplace_back(text, notification.payload.size());
    }
    return result;
  }

  std::shared_ptr<NotifyProbe> start_notify(Node& from, std::string_view to, std::string_view text,
                                            NotifySpec spec = {}) {
    auto probe = watch<NotifyProbe>(from.id() + "'s notify of " + std::string(to));
    const InitiationScope initiating;
    from->async_notify(to, bytes(text), spec, probe->handler());
    return probe;
  }
  std::shared_ptr<NotifyProbe> start_notify(Node& from, const Node& to, std::string_view text, std::uint64_t key = 0) {
    return start_notify(from, to.id(), text, {.key = key});
  }

  std::shared_ptr<NotificationsProbe> start_gather(Node& node, std::uint64_t key, std::size_t count,
                                                   std::optional<Milliseconds> timeout = {}) {
    auto probe = watch<NotificationsProbe>(node.id() + "'s receive_notifications");
    const InitiationScope initiating;
    node->async_receive_notifications(key, count, timeout, probe->handler());
    return probe;
  }

  void expect_next(Node& node, const Node& from, std::string_view text) {
    const auto probe = start_receive_notification(node, limit());
    ASSERT_FALSE(probe->error()) << probe->error().message();
    const Notification notification = std::get<1>(probe->results());
    EXPECT_EQ(notification.peer_id, from.id());
    EXPECT_EQ(notification.payload, bytes(text));
    EXPECT_EQ(notification.key, 0U);
    const auto info = node->peer_info(from.id());
    EXPECT_EQ(notification.incarnation, info ? info->incarnation : 0);
  }

  void expect_none(Node& node) {
    EXPECT_TRUE(is(start_receive_notification(node, Milliseconds(0))->error(), condition::timed_out));
  }

  /// A spec of a read or write of pages, with a notification of a key.
  [[nodiscard]] static TransferSpec keyed(std::uint64_t key, std::span<const std::byte> payload, TransferSpec spec) {
    spec.notification = payload;
    spec.notification_key = key;
    return spec;
  }

 public:
  void GoesAlone() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    EXPECT_FALSE(start_notify(a, b, "there")->error());
    expect_next(b, a, "there");
    EXPECT_FALSE(start_notify(b, a, "back")->error());
    expect_next(a, b, "back");
    EXPECT_TRUE(b.untouched());
    // Also to a peer that offers no memory.
    Node& bare = add_node({.regions = {}});
    connect(bare, a);
    EXPECT_FALSE(start_notify(a, bare, "to the bare")->error());
    expect_next(bare, a, "to the bare");
  }

  void BlockingForms() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    auto calls = aside([&, &node = a, id = b.id()] {
      node->notify(id, bytes("one"));
      std::error_code ec = std::make_error_code(std::errc::io_error);
      node->notify(id, bytes("two"), {}, ec);
      return ec;
    });
    EXPECT_FALSE(in_time(calls));
    expect_next(b, a, "one");
    expect_next(b, a, "two");
    EXPECT_THROW(a->notify("stranger", bytes("x")), TransferError);

    EXPECT_FALSE(start_notify(a, b, "three", 7)->error());
    EXPECT_EQ(texts(b->receive_notifications(7, 1)), std::vector<std::string>{"three"});
    std::error_code ec;
    EXPECT_TRUE(b->receive_notifications(7, 1, Milliseconds(1), ec).empty());
    EXPECT_TRUE(is(ec, condition::timed_out));
    EXPECT_TRUE(b->receive_notifications(7, 1, Milliseconds(1)).empty()) << "it says by its number what is missing";
  }

  void WhatIsRefused() {
    KVFERRY_TESTING_REQUIRE(notifications);
    NodeSpec spec;
    spec.options.max_pending_notifications = 1;
    const auto [a, b] = connected_pair({}, std::move(spec));
    std::string diagnostic;
    EXPECT_EQ(start_notify(a, "", "x")->error(), errc::empty_peer_id);
    EXPECT_EQ(start_notify(a, "stranger", "x")->error(), errc::unknown_peer);
    EXPECT_EQ(start_notify(a, b.id(), "", {.diagnostic = &diagnostic})->error(), std::errc::invalid_argument);
    EXPECT_FALSE(diagnostic.empty());
    EXPECT_EQ(start_notify(a, b.id(), "x", {.timeout = Milliseconds(0)})->error(), errc::timed_out);
    const std::string long_text(capabilities().max_notification_bytes + 1, 'x');
    EXPECT_EQ(start_notify(a, b, long_text)->error(), errc::notification_too_large);
    EXPECT_FALSE(start_notify(a, b, "fills it")->error());
    EXPECT_EQ(start_notify(a, b, "is too much")->error(), errc::resource_limit);
    EXPECT_EQ(start_notify(a, b, "of a key, too", 3)->error(), errc::resource_limit);
    expect_next(b, a, "fills it");
    expect_none(b);
    a->close();
    EXPECT_EQ(start_notify(a, b, "late")->error(), errc::closed);
  }

  void OfARead() {
    KVFERRY_TESTING_REQUIRE(notifications);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair({.local_bytes = 4 << 20}, {.regions = {{128}}});
    const std::vector<std::uint64_t> pages = consecutive(0, 128);
    for (std::uint64_t page = 0; page < 128; ++page) {
      fill(b.page(page), 500 + page);
    }
    for (const std::size_t count : {std::size_t{1}, std::size_t{128}}) {
      a.reuse_local_memory();
      const auto waiting = start_receive_notification(b, limit());
      const Objects objects = a.objects(count, 4096);
      const auto payload = bytes("read");
      const auto read = start(TransferKind::read, a, b, objects, notifying(payload, at(std::span(pages).first(count))));
      ASSERT_FALSE(waiting->error());
      EXPECT_TRUE(objects.match(500)) << "the bytes are there before the peer hears of it";
      EXPECT_EQ(std::get<1>(waiting->results()).payload, payload);
      EXPECT_EQ(read->outcome(), done(count)) << read->diagnostic();
    }
  }

  void OfAReadThatFails() {
    KVFERRY_TESTING_REQUIRE(notifications);
    KVFERRY_TESTING_REQUIRE(read);
    NodeSpec spec{.regions = {{8}, {8, 4096, Access::none}}};
    spec.options.max_pending_notifications = 1;
    const auto [a, b] = connected_pair({}, std::move(spec));
    const auto payload = bytes("of a failed read");
    EXPECT_EQ(start(TransferKind::read, a, b, a.objects({64}), notifying(payload, at({8})))->outcome(),
              failed(errc::index_out_of_range));
    EXPECT_EQ(start(TransferKind::read, a, b, a.objects({64}), notifying(payload, at({1}, 1)))->outcome(),
              failed(errc::access_denied));
    EXPECT_EQ(start(TransferKind::read, a, b, a.objects({64}), within(Milliseconds(0), notifying(payload, at({1}))))
                  ->outcome(),
              failed(errc::timed_out));
    expect_none(b);
    // One that is refused takes nothing away from the read.
    fill(b.page(2).first(64), 9);
    EXPECT_FALSE(start_notify(a, b, "fills it")->error());
    const Objects objects = a.objects({64});
    const auto read = start(TransferKind::read, a, b, objects, notifying(payload, at({2})));
    EXPECT_EQ(read->outcome(), failed(errc::resource_limit, 1));
    EXPECT_FALSE(read->statuses()[0]);
    EXPECT_TRUE(objects.match(9));
  }

  void AnEmptyBatchWithOneIsANotify() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    const auto payload = bytes("of nothing");
    EXPECT_EQ(start(TransferKind::write, a, b, Objects(), notifying(payload, {}))->outcome(), done(0));
    expect_next(b, a, "of nothing");
    if (capabilities().read) {
      EXPECT_EQ(start(TransferKind::read, a, b, Objects(), notifying(payload, {}))->outcome(), done(0));
      expect_next(b, a, "of nothing");
    }
    EXPECT_EQ(start(TransferKind::write, a, b, a.objects({1}).fill(1), keyed(5, {}, at({0})))->outcome().error,
              std::errc::invalid_argument)
        << "a key without a notification";
  }

  void KeyedOnesAreForTheirKeyAlone() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    EXPECT_FALSE(start_notify(a, b, "of 1", 1)->error());
    EXPECT_FALSE(start_notify(a, b, "of 2", 2)->error());
    EXPECT_FALSE(start_notify(a, b, "of none")->error());
    const auto payload = bytes("of 2, with a write");
    EXPECT_EQ(start(TransferKind::write, a, b, a.objects({8}).fill(1), keyed(2, payload, at({0})))->outcome(), done(1));
    std::vector<std::string> expected{"of 2", "of 2, with a write"};
    if (capabilities().read) {
      const auto of_read = bytes("of 2, with a read");
      EXPECT_EQ(start(TransferKind::read, a, b, a.objects({8}), keyed(2, of_read, at({0})))->outcome(), done(1));
      expected.emplace_back("of 2, with a read");
    }
    expect_next(b, a, "of none");
    expect_none(b);
    const auto gathered = start_gather(b, 2, expected.size(), limit());
    EXPECT_FALSE(gathered->error());
    EXPECT_EQ(texts(std::get<1>(gathered->results())), expected);
    EXPECT_EQ(texts(std::get<1>(start_gather(b, 1, 1, limit())->results())), std::vector<std::string>{"of 1"});
    // Notifications without a key may be gathered as well.
    EXPECT_FALSE(start_notify(a, b, "one")->error());
    EXPECT_FALSE(start_notify(a, b, "two")->error());
    EXPECT_EQ(texts(std::get<1>(start_gather(b, 0, 2, limit())->results())), (std::vector<std::string>{"one", "two"}));
  }

  void OneWaitForAllPartsOfARequest() {
    KVFERRY_TESTING_REQUIRE(notifications);
    constexpr std::uint64_t key = 0xffff'0000'ffff'0001;
    Node& hub = add_node();
    std::vector<Node*> peers;
    for (int i = 0; i < 4; ++i) {
      peers.push_back(&add_node());
      connect(*peers.back(), hub);
    }
    const auto all = start_gather(hub, key, 8, limit());
    for (int round = 0; round < 2; ++round) {
      for (Node* const peer : peers) {
        EXPECT_FALSE(all->ended());
        EXPECT_FALSE(start_notify(*peer, hub, peer->id(), key)->error());
      }
    }
    ASSERT_FALSE(all->error());
    const auto notifications = std::get<1>(all->results());
    ASSERT_EQ(notifications.size(), 8U);
    for (std::size_t i = 0; i < notifications.size(); ++i) {
      const Node& peer = *peers[i % 4];
      EXPECT_EQ(notifications[i].peer_id, peer.id());
      EXPECT_EQ(notifications[i].incarnation, hub->peer_info(peer.id())->incarnation);
      EXPECT_EQ(notifications[i].payload, bytes(peer.id()));
      EXPECT_EQ(notifications[i].key, key);
    }
  }

  void WaitsForAKeyAreServedInTheirOrder() {
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    const auto first = start_gather(b, 9, 2, limit());
    const auto second = start_gather(b, 9, 1, limit());
    EXPECT_FALSE(start_notify(a, b, "1", 9)->error());
    EXPECT_FALSE(start_notify(a, b, "2", 9)->error());
    EXPECT_EQ(texts(std::get<1>(first->results())), (std::vector<std::string>{"1", "2"}));
    EXPECT_FALSE(second->ended());
    EXPECT_FALSE(start_notify(a, b, "3", 9)->error());
    EXPECT_EQ(texts(std::get<1>(second->results())), std::vector<std::string>{"3"});
    EXPECT_FALSE(start_gather(b, 9, 0)->error()) << "none are always there";
  }

  void APeerHasItsShareOfTheQueueUntilItIsDisconnected() {
    KVFERRY_TESTING_REQUIRE(notifications);
    NodeSpec spec;
    spec.options.max_pending_notifications_of_peer = 3;
    const auto [a, b] = connected_pair({}, std::move(spec));
    Node& other = add_node();
    connect(other, b);
    EXPECT_FALSE(start_notify(a, b, "without")->error());
    EXPECT_FALSE(start_notify(a, b, "nobody asks", 5)->error());
    EXPECT_FALSE(start_notify(a, b, "nor for this", 6)->error());
    EXPECT_EQ(start_notify(a, b, "is too much", 7)->error(), errc::resource_limit);
    EXPECT_FALSE(start_notify(other, b, "of another", 5)->error());
    auto leaving = watch<NotifyProbe>("b's disconnect of a");
    {
      const InitiationScope initiating;
      b->async_disconnect(a.id(), leaving->handler());
    }
    EXPECT_FALSE(leaving->error());
    EXPECT_TRUE(is(start_gather(b, 6, 1, Milliseconds(0))->error(), condition::timed_out));
    const auto gathered = start_gather(b, 5, 1);
    EXPECT_FALSE(gathered->error());
    EXPECT_EQ(texts(std::get<1>(gathered->results())), std::vector<std::string>{"of another"});
    const auto probe = start_receive_notification(b, limit());
    ASSERT_FALSE(probe->error()) << probe->error().message();
    EXPECT_EQ(std::get<1>(probe->results()).payload, bytes("without"));
  }

  void ATimeoutGivesBackWhatCame() {
    KVFERRY_TESTING_REQUIRE(notifications);
    NodeSpec spec;
    spec.options.max_pending_notifications = 3;
    const auto [a, b] = connected_pair({}, std::move(spec));
    EXPECT_FALSE(start_notify(a, b, "1", 9)->error());
    EXPECT_FALSE(start_notify(a, b, "2", 9)->error());
    const auto late = start_gather(b, 9, 3, Milliseconds(1));
    EXPECT_TRUE(is(late->error(), condition::timed_out));
    EXPECT_EQ(texts(std::get<1>(late->results())), (std::vector<std::string>{"1", "2"}));
    EXPECT_TRUE(is(start_gather(b, 9, 4)->error(), condition::invalid_argument)) << "more than there is room for, ever";
    // The bound holds for what waits for the rest, too; the last one needs no room.
    const auto all = start_gather(b, 9, 3, limit());
    EXPECT_FALSE(start_notify(a, b, "1", 9)->error());
    EXPECT_FALSE(start_notify(a, b, "2", 9)->error());
    EXPECT_FALSE(start_notify(a, b, "other")->error());
    EXPECT_EQ(start_notify(a, b, "too much")->error(), errc::resource_limit);
    EXPECT_FALSE(start_notify(a, b, "3", 9)->error());
    EXPECT_EQ(texts(std::get<1>(all->results())), (std::vector<std::string>{"1", "2", "3"}));
    const auto closed = start_gather(b, 9, 1);
    b->close();
    EXPECT_EQ(closed->error(), errc::closed);
  }
};

KVFERRY_TESTING_SUITE(NotifyTest, NotifyTests, GoesAlone, BlockingForms, WhatIsRefused, OfARead, OfAReadThatFails,
                      AnEmptyBatchWithOneIsANotify, KeyedOnesAreForTheirKeyAlone, OneWaitForAllPartsOfARequest,
                      WaitsForAKeyAreServedInTheirOrder, APeerHasItsShareOfTheQueueUntilItIsDisconnected,
                      ATimeoutGivesBackWhatCame);

}  // namespace kvferry::testing
