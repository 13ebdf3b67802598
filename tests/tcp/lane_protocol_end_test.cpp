// SPDX-License-Identifier: Apache-2.0
//
// When what is given up has ended: not before the peer has dealt with all that was sent of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>
#include "common/allocation_limit.hpp"
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing::lane_end {
namespace {

constexpr std::size_t everything = std::size_t{64} << 20;

/// Takes whatever a side has to send.
std::vector<std::byte> take_all(Side& side) {
  std::vector<std::byte> all;
  for (;;) {
    const auto more = side.take(everything);
    if (more.empty()) {
      return all;
    }
    all.insert(all.end(), more.begin(), more.end());
  }
}

TransferRequest write_of(Side& side, std::size_t pages, std::vector<std::byte> notification = {}) {
  TransferRequest write = request(TransferKind::write, {});
  for (std::size_t i = 0; i < pages; ++i) {
    write.objects.push_back(side.page_at(i));
    write.remote_indexes.push_back(i);
  }
  write.notification = std::move(notification);
  return write;
}

TEST(LaneProtocolEnd, OfAConnectionNeedsNoMemory) {
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    SCOPED_TRACE(allocations);
    Side a;
    const auto under_way = std::make_shared<Outcome>();
    const auto waiting = std::make_shared<Outcome>();
    (void)a.start(write_of(a, 4), under_way);
    ASSERT_FALSE(take_all(a).empty());
    (void)a.start(write_of(a, 4), waiting);
    int told = 0;
    a.protocol->fence([&] { ++told; });
    a.protocol->fence([&] { ++told; });
    a.protocol->region_removed(1, [&] { ++told; });
    std::string why(100, 'w');
    test::allocation_refused = false;
    test::allocations_left = allocations;
    bool thrown = false;
    try {
      a.protocol->fail(errc::closed, std::move(why));
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    EXPECT_FALSE(thrown);
    EXPECT_EQ(under_way->ec, errc::closed_in_flight);
    EXPECT_EQ(waiting->ec, errc::closed);
    EXPECT_EQ(std::ranges::count(under_way->statuses, std::error_code(errc::closed_in_flight)), 4);
    EXPECT_EQ(under_way->calls + waiting->calls, 2);
    EXPECT_EQ(told, 3);
  }
}

TEST(LaneProtocolEnd, AWriteThatIsGivenUpEndsWhenThePeerHasDealtWithIt) {
  Side a;
  Side b;
  fill(a.memory, 1);
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(write_of(a, 1000), outcome);
  // All of three frames and a part of the fourth; what comes behind is in no socket yet.
  const auto sent = a.take(3 * max_chunk_bytes + max_chunk_bytes / 2);
  a.stop(*operation);
  EXPECT_TRUE(a.protocol->draining_since());
  const auto rest = take_all(a);
  EXPECT_EQ(outcome->calls, 0);
  ASSERT_FALSE(b.feed(sent));
  ASSERT_FALSE(a.feed(take_all(b)));
  EXPECT_EQ(outcome->calls, 0) << "the fourth frame is under way";
  ASSERT_FALSE(b.feed(rest));
  ASSERT_FALSE(a.feed(take_all(b)));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  EXPECT_NE(outcome->ec, condition::may_still_land);
  EXPECT_FALSE(a.protocol->draining_since());

  // The objects that are said to have landed have, and no others.
  EXPECT_GT(outcome->count, 0U);
  EXPECT_LT(outcome->count, 1000U);
  for (std::size_t i = 0; i < 1000; ++i) {
    if (!outcome->statuses[i]) {
      EXPECT_TRUE(std::ranges::equal(a.page_at(i), b.page_at(i))) << i;
    }
  }
}

TEST(LaneProtocolEnd, AWriteThatIsGivenUpWhenAllOfItLandsHasSucceeded) {
  for (const std::size_t pages : {std::size_t{1}, std::size_t{3}}) {
    Side a;
    Side b;
    fill(a.memory, 2);
    const auto outcome = std::make_shared<Outcome>();
    const auto operation = a.start(write_of(a, pages, {std::byte{7}}), outcome);
    const auto sent = take_all(a);
    a.stop(*operation);
    EXPECT_EQ(outcome->calls, 0);
    ASSERT_FALSE(b.feed(sent));
    ASSERT_FALSE(a.feed(take_all(b)));
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
    EXPECT_EQ(outcome->count, pages);
    EXPECT_EQ(b.host->notifications.size(), 1U);
  }
}

TEST(LaneProtocolEnd, NoNotificationFollowsAWriteThatWasGivenUpBeforeItWasSent) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(write_of(a, Side::pages, {std::byte{7}}), outcome);
  const auto sent = take_all(a);  // all objects; the notification waits for their acknowledgements
  a.stop(*operation);
  ASSERT_FALSE(b.feed(sent));
  ASSERT_FALSE(a.feed(take_all(b)));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  EXPECT_EQ(outcome->count, Side::pages);
  ASSERT_FALSE(settle(a, b));
  EXPECT_TRUE(b.host->notifications.empty());
  EXPECT_TRUE(a.protocol->idle());
}

TEST(LaneProtocolEnd, ANotificationThatWasSentIsHandedOutBeforeItsWriteEnds) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(write_of(a, Side::pages, {std::byte{7}}), outcome);
  ASSERT_FALSE(b.feed(take_all(a)));
  ASSERT_FALSE(a.feed(take_all(b)));
  const auto notification = take_all(a);
  a.stop(*operation);
  EXPECT_EQ(outcome->calls, 0);
  ASSERT_FALSE(b.feed(notification));
  EXPECT_EQ(b.host->notifications.size(), 1U);
  ASSERT_FALSE(a.feed(take_all(b)));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec);
}

TEST(LaneProtocolEnd, WhatBreaksWithBytesUnderWaySaysSo) {
  for (const auto kind : {TransferKind::write, TransferKind::send}) {
    for (const bool given_up : {false, true}) {
      Side a;
      Side b;
      const auto outcome = std::make_shared<Outcome>();
      const auto recv = std::make_shared<Outcome>();
      std::vector<MutableBuffer> objects{a.page_at(0)};
      if (kind == TransferKind::send) {
        b.start(request(TransferKind::recv, {b.page_at(0)}), recv);
        ASSERT_FALSE(a.feed(take_all(b)));
      }
      const auto operation =
          a.start(kind == TransferKind::write ? request(kind, objects, {0}) : request(kind, objects), outcome);
      (void)a.take(100);
      if (given_up) {
        a.stop(*operation);
      }
      EXPECT_EQ(outcome->calls, 0);
      a.protocol->fail(errc::closed, "the channel was closed");
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_EQ(outcome->ec, given_up ? errc::cancelled_in_flight : errc::closed_in_flight);
      EXPECT_EQ(outcome->ec, condition::may_still_land);
      EXPECT_EQ(outcome->ec, condition::cancelled);
    }
  }
}

TEST(LaneProtocolEnd, WhatBreaksWithNothingUnderWaySaysNothingOfTheKind) {
  Side a;
  Side b;
  const auto unsent = std::make_shared<Outcome>();
  const auto read = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  a.start(request(TransferKind::read, {a.page_at(1)}, {1}), read);
  a.start(request(TransferKind::recv, {a.page_at(2)}), recv);
  (void)take_all(a);
  a.start(request(TransferKind::write, {a.page_at(0)}, {0}), unsent);
  a.protocol->fill(everything);  // queued, but nothing of it sent
  a.protocol->fail(errc::closed, "the channel was closed");
  for (const auto& outcome : {unsent, read, recv}) {
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->ec, errc::closed);
  }
}

TEST(LaneProtocolEnd, AConnectionThatBrokeWithBytesUnderWayIsRememberedAsSuch) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    Side a;
    a.start(request(kind, {a.page_at(0)}, {0}), std::make_shared<Outcome>());
    EXPECT_FALSE(a.protocol->in_flight()) << "nothing of it has been queued";
    (void)take_all(a);
    EXPECT_EQ(a.protocol->in_flight(), kind == TransferKind::write);
    a.protocol->fail(errc::connection_lost, "cut");
    EXPECT_EQ(a.protocol->in_flight(), kind == TransferKind::write) << "what is unsent is to be dropped";
  }
}

TEST(LaneProtocolEnd, ASendThatIsGivenUpEndsWhenThePeerHasDealtWithIt) {
  Side a;
  Side b;
  std::vector<std::byte> large(8 * max_chunk_bytes);
  std::vector<std::byte> target(large.size());
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  b.start(request(TransferKind::recv, {MutableBuffer(target)}), recv);
  ASSERT_FALSE(a.feed(take_all(b)));
  const auto operation = a.start(request(TransferKind::send, {MutableBuffer(large)}), send);
  const auto sent = a.take(2 * max_chunk_bytes);
  a.stop(*operation);
  EXPECT_EQ(send->calls, 0);
  ASSERT_FALSE(b.feed(sent));
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(send->calls, 1);
  EXPECT_EQ(send->ec, errc::cancelled);
  EXPECT_EQ(send->count, 0U);
  EXPECT_EQ(recv->ec, errc::peer_cancelled);
}

TEST(LaneProtocolEnd, ASendThatLostItsRecvAndIsGivenUpThenEndsOnce) {
  Side a;
  Side b;
  std::vector<std::byte> large(3 * max_chunk_bytes);
  std::vector<std::byte> target(large.size());
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  const auto receiving = b.start(request(TransferKind::recv, {MutableBuffer(target)}), recv);
  ASSERT_FALSE(a.feed(take_all(b)));
  const auto sending = a.start(request(TransferKind::send, {MutableBuffer(large)}), send);
  const auto sent = a.take(max_chunk_bytes + 1000);
  b.stop(*receiving);
  ASSERT_FALSE(a.feed(take_all(b)));
  a.stop(*sending);
  ASSERT_FALSE(b.feed(sent));
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(send->calls, 1);
  EXPECT_EQ(send->ec, errc::cancelled);
  EXPECT_EQ(send->statuses[0], errc::cancelled);
  EXPECT_EQ(recv->ec, errc::cancelled);
}

TEST(LaneProtocolEnd, ASendAndItsRecvThatAreGivenUpAtOnceHaveBothFailed) {
  Side a;
  Side b;
  std::vector<std::byte> data(1000);
  std::vector<std::byte> target(data.size());
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  const auto receiving = b.start(request(TransferKind::recv, {MutableBuffer(target)}), recv);
  ASSERT_FALSE(a.feed(take_all(b)));
  const auto sending = a.start(request(TransferKind::send, {MutableBuffer(data)}), send);
  const auto sent = take_all(a);
  a.stop(*sending);
  EXPECT_EQ(send->calls, 0);
  b.stop(*receiving);
  EXPECT_EQ(recv->ec, errc::cancelled);
  ASSERT_FALSE(b.feed(sent));
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(send->calls, 1);
  EXPECT_EQ(send->ec, errc::cancelled) << "nobody has received it";
  EXPECT_EQ(send->count, 0U);
}

TEST(LaneProtocolEnd, TheLastObjectOfAPageWins) {
  Side a;
  Side b;
  fill(a.memory, 3);
  TransferRequest write = request(TransferKind::write, {});
  for (std::size_t i = 0; i < Side::pages; ++i) {
    write.objects.push_back(a.page_at(i));
    write.remote_indexes.push_back(i % 2);
  }
  const auto outcome = std::make_shared<Outcome>();
  a.start(std::move(write), outcome);
  ASSERT_FALSE(settle(a, b, 1000));
  EXPECT_EQ(outcome->count, Side::pages);
  EXPECT_TRUE(std::ranges::equal(b.page_at(0), a.page_at(Side::pages - 2)));
  EXPECT_TRUE(std::ranges::equal(b.page_at(1), a.page_at(Side::pages - 1)));
}

TEST(LaneProtocolEnd, TheLastPageReadIntoABufferWins) {
  Side a;
  Side b;
  fill(b.memory, 4);
  TransferRequest read = request(TransferKind::read, {});
  for (std::size_t i = 0; i < Side::pages; ++i) {
    read.objects.push_back(a.page_at(0));
    read.remote_indexes.push_back(i);
  }
  const auto outcome = std::make_shared<Outcome>();
  a.start(std::move(read), outcome);
  ASSERT_FALSE(settle(a, b, 1000));
  EXPECT_EQ(outcome->count, Side::pages);
  EXPECT_TRUE(std::ranges::equal(a.page_at(0), b.page_at(Side::pages - 1)));
}

TEST(LaneProtocolEnd, AFenceIsAnsweredWhenTheWritesBeforeItHaveEnded) {
  Side a;
  Side b;
  const auto before = std::make_shared<Outcome>();
  const auto after = std::make_shared<Outcome>();
  a.start(write_of(a, 3), before);
  a.start(request(TransferKind::read, {a.page_at(9)}, {1}), std::make_shared<Outcome>());
  int done = 0;
  b.protocol->fence([&done] { ++done; });
  b.protocol->fence([&done] { ++done; });
  ASSERT_FALSE(a.feed(take_all(b)));
  const auto first = take_all(a);
  a.start(request(TransferKind::recv, {a.page_at(0)}), after);  // for ever, and no write
  ASSERT_FALSE(b.feed(first));
  EXPECT_EQ(before->calls, 0);
  EXPECT_EQ(done, 0);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(before->calls, 1);
  EXPECT_EQ(done, 2);
}

TEST(LaneProtocolEnd, AFenceOfAConnectionThatIsGoneHasNothingToWaitFor) {
  Side a;
  int done = 0;
  a.protocol->fence([&done] { ++done; });
  (void)take_all(a);
  EXPECT_EQ(done, 0);
  a.protocol->fail(errc::connection_lost, "cut");
  EXPECT_EQ(done, 1);
  a.protocol->fence([&done] { ++done; });
  EXPECT_EQ(done, 2);
}

TEST(LaneProtocolEnd, FencesThatMakeNoSenseBreakTheConnection) {
  FrameHeader header;
  header.type = FrameType::fence_ack;
  Side unasked;
  EXPECT_EQ(unasked.feed(frame_bytes(header)), errc::protocol_violation);
  header.type = FrameType::fence;
  Side twice;
  ASSERT_FALSE(twice.feed(frame_bytes(header)));
  EXPECT_EQ(twice.feed(frame_bytes(header)), errc::protocol_violation);
}

// A peer that takes no answers could otherwise ask without end.
TEST(LaneProtocolEnd, AFenceThatFollowsAnAnswerWhichWasNotSentBreaksTheConnection) {
  FrameHeader header;
  header.type = FrameType::fence;
  Side side;
  ASSERT_FALSE(side.feed(frame_bytes(header)));
  side.protocol->answer_fence();
  EXPECT_EQ(side.feed(frame_bytes(header)), errc::protocol_violation);

  Side other;
  ASSERT_FALSE(other.feed(frame_bytes(header)));
  EXPECT_EQ(take_all(other).size(), sizeof(FrameHeader));
  EXPECT_FALSE(other.feed(frame_bytes(header)));
}

TEST(LaneProtocolEnd, AChannelThatIsBeingClosedTakesNothingNewAndAnswersNothingNew) {
  Side a;
  Side b;
  fill(a.memory, 5);
  const auto before = std::make_shared<Outcome>();
  a.start(write_of(a, 1), before);
  ASSERT_FALSE(b.feed(take_all(a)));
  b.protocol->leave();
  const auto at_the_end = b.memory;
  const auto write = std::make_shared<Outcome>();
  const auto read = std::make_shared<Outcome>();
  a.start(write_of(a, 300, {std::byte{1}}), write);
  a.start(request(TransferKind::read, {a.page_at(9)}, {100}), read);
  a.start(request(TransferKind::recv, {a.page_at(10)}), std::make_shared<Outcome>());
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(before->count, 1U) << "what came before is answered";
  EXPECT_TRUE(kvferry::testing::same_bytes(b.memory, at_the_end));
  EXPECT_TRUE(b.host->notifications.empty());
  EXPECT_EQ(write->calls + read->calls, 0);
  EXPECT_TRUE(b.protocol->settled());
  a.protocol->fail(errc::peer_closed, "the peer closed the connection");
  EXPECT_EQ(write->ec, condition::may_still_land);
  EXPECT_EQ(read->ec, errc::peer_closed);
}

TEST(LaneProtocolEnd, NothingOfAPeerThatIsGoneIsPlaced) {
  Side a;
  Side b;
  fill(a.memory, 5);
  const auto before = b.memory;
  const auto write = std::make_shared<Outcome>();
  a.start(write_of(a, 300, {std::byte{1}}), write);
  const auto sent = take_all(a);
  const auto half = std::span(sent).first(sent.size() / 2);
  ASSERT_FALSE(b.feed(half));
  b.protocol->peer_gone();
  const auto at_the_end = b.memory;
  EXPECT_NE(at_the_end, before);
  ASSERT_FALSE(b.feed(std::span(sent).subspan(half.size())));
  EXPECT_TRUE(kvferry::testing::same_bytes(b.memory, at_the_end));
  EXPECT_TRUE(b.host->notifications.empty());
  // The end of a connection may be seen here before it is there: over rings, what the peer says gets through.
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(write->ec, errc::connection_lost);
}

TEST(LaneProtocolEnd, WhatAPeerThatIsGoneHasAnsweredCounts) {
  Side a;
  Side b;
  fill(b.memory, 6);
  const auto write = std::make_shared<Outcome>();
  const auto read = std::make_shared<Outcome>();
  a.start(write_of(a, 3), write);
  a.start(request(TransferKind::read, {a.page_at(9)}, {100}), read);
  ASSERT_FALSE(b.feed(take_all(a)));
  a.protocol->peer_gone();
  ASSERT_FALSE(a.feed(take_all(b)));
  EXPECT_EQ(write->count, 3U);
  EXPECT_EQ(read->count, 1U);
  EXPECT_TRUE(std::ranges::equal(a.page_at(9), b.page_at(100)));
}

}  // namespace
}  // namespace kvferry::tcp::testing::lane_end
