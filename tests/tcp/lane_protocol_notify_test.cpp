// SPDX-License-Identifier: Apache-2.0
// Notifications alone, with reads and with keys, on a lane.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include <kvferry/error.hpp>

#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

TransferRequest notifying(TransferRequest request, std::uint64_t key = 0) {
  request.notification.assign(3, std::byte{9});
  request.notification_key = key;
  return request;
}

TransferRequest read_of(Side& to, std::size_t count) {
  auto read = request(TransferKind::read, {});
  for (std::size_t i = 0; i < count; ++i) {
    read.objects.push_back(to.page_at(i));
    read.remote_indexes.push_back(i);
  }
  return read;
}

TEST(LaneProtocolNotify, OneAloneHasAFrameOfItsOwn) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  a.start(notifying(request(TransferKind::write, {}), 77), outcome);
  EXPECT_EQ(outcome->calls, 0) << "not before the peer has it";
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
  EXPECT_EQ(b.host->notifications, std::vector(1, std::vector<std::byte>(3, std::byte{9})));
  EXPECT_EQ(b.host->notification_keys, std::vector<std::uint64_t>{77});
}

TEST(LaneProtocolNotify, AKeyTravelsWithAWriteOfOneFrameAndOfMany) {
  Side a;
  Side b;
  for (const std::size_t count : {std::size_t{1}, Side::pages}) {
    auto write = read_of(a, count);
    write.kind = TransferKind::write;
    a.start(notifying(std::move(write), count), std::make_shared<Outcome>());
    ASSERT_FALSE(settle(a, b));
    ASSERT_FALSE(b.host->notification_keys.empty());
    EXPECT_EQ(b.host->notification_keys.back(), count);
  }
}

TEST(LaneProtocolNotify, AReadsComesWhenItsBytesAreHere) {
  Side a;
  Side b;
  fill(b.memory, 3);
  for (const std::size_t count : {std::size_t{1}, Side::pages}) {
    b.host->notifications.clear();
    std::ranges::fill(a.memory, std::byte{});
    const auto outcome = std::make_shared<Outcome>();
    a.start(notifying(read_of(a, count), 5), outcome);
    while (outcome->calls == 0) {
      ASSERT_FALSE(b.feed(a.take(100'000)));
      if (!b.host->notifications.empty()) {
        ASSERT_TRUE(std::ranges::equal(std::span(a.memory).first(count * Side::page),
                                       std::span(b.memory).first(count * Side::page)));
      }
      ASSERT_FALSE(a.feed(b.take(100'000)));
    }
    EXPECT_FALSE(outcome->ec);
    EXPECT_EQ(outcome->count, count);
    EXPECT_EQ(b.host->notifications.size(), 1U);
    EXPECT_EQ(b.host->notification_keys.back(), 5U);
  }
}

TEST(LaneProtocolNotify, AFailedReadGivesNone) {
  Side a;
  Side b;
  auto read = read_of(a, 3);
  read.remote_indexes[1] = Side::pages;  // as if this side had not checked
  const auto outcome = std::make_shared<Outcome>();
  a.start(notifying(std::move(read)), outcome);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(outcome->ec, errc::index_out_of_range);
  EXPECT_TRUE(b.host->notifications.empty());
}

TEST(LaneProtocolNotify, ARefusedOneLeavesTheReadItsObjects) {
  Side a;
  Side b;
  b.host->notification_limit = 0;
  const auto outcome = std::make_shared<Outcome>();
  a.start(notifying(read_of(a, 2)), outcome);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(outcome->ec, errc::resource_limit);
  EXPECT_EQ(outcome->count, 2U);
}

TEST(LaneProtocolNotify, AStoppedReadWaitsForTheAnswerToItsNotification) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(notifying(read_of(a, 1)), outcome);
  ASSERT_FALSE(b.feed(a.take(100'000)));
  ASSERT_FALSE(a.feed(b.take(100'000)));
  ASSERT_EQ(outcome->calls, 0);
  ASSERT_FALSE(b.feed(a.take(100'000)));  // the notification
  a.stop(*operation);
  EXPECT_EQ(outcome->calls, 0) << "it is handed out, or will be";
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(outcome->ec);
  EXPECT_EQ(outcome->count, 1U);
  EXPECT_EQ(b.host->notifications.size(), 1U);
}

TEST(LaneProtocolNotify, WhereNobodyAnswersAReadsErrorSaysThatItsNotificationMayCome) {
  for (const bool sent : {false, true}) {
    Side a;
    Side b;
    const auto outcome = std::make_shared<Outcome>();
    a.start(notifying(read_of(a, 1)), outcome);
    ASSERT_FALSE(b.feed(a.take(100'000)));
    ASSERT_FALSE(a.feed(b.take(100'000)));
    if (sent) {
      (void)a.take(100'000);
    }
    a.protocol->fail(errc::timed_out, "no answer");
    EXPECT_EQ(outcome->ec == condition::may_still_land, sent) << outcome->ec.message();
    EXPECT_EQ(outcome->count, 1U);
  }
}

TEST(LaneProtocolNotify, WhatIsStoppedBeforeItGoesOutIsNotSent) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(notifying(request(TransferKind::write, {})), outcome);
  a.stop(*operation);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  ASSERT_FALSE(settle(a, b));
  EXPECT_TRUE(b.host->notifications.empty());
}

TEST(LaneProtocolNotify, AnAcknowledgementOfAReadThatAsksForItsDataIsAViolation) {
  Side a;
  Side b;
  a.start(notifying(read_of(a, 1)), std::make_shared<Outcome>());
  a.start(request(TransferKind::write, {a.page_at(0)}, {1}), std::make_shared<Outcome>());
  (void)a.take(100'000);  // of both
  FrameHeader ack;
  ack.type = FrameType::write_ack;
  ack.operation = 1;
  EXPECT_EQ(a.feed(frame_bytes(ack)), errc::protocol_violation);
}

}  // namespace
}  // namespace kvferry::tcp::testing
