// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <random>
#include <string>

#include <kvferry/tcp/frame_reader.hpp>
#include "peer_block.hpp"
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

std::vector<std::uint64_t> shuffled(std::size_t count) {
  std::vector<std::uint64_t> indexes(count);
  for (std::size_t i = 0; i < count; ++i) {
    indexes[i] = i;
  }
  std::ranges::shuffle(indexes, std::mt19937(count));
  return indexes;
}

/// Every step size makes frames meet the boundaries of reads elsewhere.
class LaneProtocolSteps : public ::testing::TestWithParam<std::size_t> {
 protected:
  static void move(Travel travel, TransferKind kind) {
    const std::size_t count = GetParam() < 64 ? 3 : 600;
    const auto indexes = shuffled(Side::pages);
    Ends ends(travel);
    Side& a = ends.a;
    Side& b = ends.b;
    fill(a.memory, 1);
    fill(b.memory, 2);
    auto expected_a = a.memory;
    auto expected_b = b.memory;
    std::vector<MutableBuffer> local;
    std::vector<MutableBuffer> remote;
    std::vector<std::uint64_t> remote_indexes;
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size = i % 3 == 0 ? Side::page : i % 5 * 100;
      bytes += size;
      local.push_back(a.page_at(indexes[i], size));
      remote_indexes.push_back(indexes[Side::pages - 1 - i]);
      remote.push_back(b.page_at(remote_indexes.back(), size));
    }
    const auto outcome = std::make_shared<Outcome>();
    const auto peer_outcome = std::make_shared<Outcome>();
    if (kind == TransferKind::send) {
      b.start(ends.prepared(request(TransferKind::recv, remote)), peer_outcome);
      a.start(ends.prepared(request(kind, local)), outcome);
    } else {
      a.start(ends.prepared(request(kind, local, remote_indexes)), outcome);
    }
    ASSERT_FALSE(settle(a, b, GetParam()));

    EXPECT_EQ(outcome->calls, 1);
    EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
    EXPECT_EQ(outcome->count, count);
    for (std::size_t i = 0; i < count; ++i) {
      const auto a_offset = static_cast<std::size_t>(local[i].data() - a.memory.data());
      const auto b_offset = static_cast<std::size_t>(remote[i].data() - b.memory.data());
      if (kind == TransferKind::read) {
        std::memcpy(expected_a.data() + a_offset, expected_b.data() + b_offset, local[i].size());
      } else {
        std::memcpy(expected_b.data() + b_offset, expected_a.data() + a_offset, local[i].size());
      }
    }
    EXPECT_TRUE(kvferry::testing::same_bytes(a.memory, expected_a));
    EXPECT_TRUE(kvferry::testing::same_bytes(b.memory, expected_b));
    EXPECT_EQ(ends.fetched(), travel.referred ? bytes : 0);
  }
};
INSTANTIATE_TEST_SUITE_P(Steps, LaneProtocolSteps,
                         ::testing::Values(1, 7, 63, 64, 65, 511, FrameReader::read_ahead - 1, FrameReader::read_ahead,
                                           FrameReader::read_ahead + 1, 262144));

TEST_P(LaneProtocolSteps, WriteReadSendRecvMoveEveryByteAndNoOther) {
  for (const Travel travel : all_travels) {
    for (const auto kind : {TransferKind::write, TransferKind::read, TransferKind::send}) {
      SCOPED_TRACE(std::string(to_string(kind)) + (travel.checked ? ", with checksums" : "") +
                   (travel.referred ? ", by reference" : ""));
      move(travel, kind);
    }
  }
}

TEST(LaneProtocol, ObjectsLargerThanAFrameAreCutAndJoined) {
  constexpr std::size_t size = 3 * max_chunk_bytes + 12345;
  std::vector<std::byte> sent(size);
  std::vector<std::byte> got(size);
  fill(sent, 3);
  Side a;
  Side b;
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  a.start(request(TransferKind::send, {MutableBuffer(sent)}), send);
  b.start(request(TransferKind::recv, {MutableBuffer(got)}), recv);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(send->count, 1U);
  EXPECT_EQ(recv->count, 1U);
  EXPECT_EQ(recv->sizes.at(0), size);
  EXPECT_EQ(got, sent);
}

TEST(LaneProtocol, AFrameOfAsManyObjectsAsItTakesGoesOutInOneCall) {
  Side a;
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> indexes(sent_chunk_objects);
  for (std::size_t i = 0; i < indexes.size(); ++i) {
    indexes[i] = i;
    objects.push_back(a.page_at(i, 8));
  }
  TransferRequest write = request(TransferKind::write, std::move(objects), std::move(indexes));
  write.notification.resize(3);
  a.start(std::move(write), std::make_shared<Outcome>());
  a.protocol->fill(max_chunk_bytes);

  std::array<iovec, IOV_MAX> pieces;
  const std::size_t count = a.protocol->out().front(pieces, a.protocol->out().bytes());
  std::size_t bytes = 0;
  for (const iovec& piece : std::span(pieces).first(count)) {
    bytes += piece.iov_len;
  }
  EXPECT_GT(bytes, sent_chunk_objects * 8);
  EXPECT_EQ(bytes, a.protocol->out().bytes());
}

TEST(LaneProtocol, AnObjectThatDoesNotFitIsRefusedAndTheOthersArrive) {
  Side a;
  Side b;
  fill(a.memory, 4);
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  a.start(request(TransferKind::send, {a.page_at(0), a.page_at(1), a.page_at(2)}), send);
  b.start(request(TransferKind::recv, {b.page_at(0), b.page_at(1, 100), b.page_at(2)}), recv);
  ASSERT_FALSE(settle(a, b));
  for (const auto& outcome : {send, recv}) {
    EXPECT_EQ(outcome->ec, errc::buffer_too_small);
    EXPECT_EQ(outcome->count, 2U);
    EXPECT_FALSE(outcome->statuses[0]);
    EXPECT_EQ(outcome->statuses[1], errc::buffer_too_small);
    EXPECT_FALSE(outcome->statuses[2]);
    EXPECT_NE(outcome->diagnostic.find("4096"), std::string::npos) << outcome->diagnostic;
    EXPECT_NE(outcome->diagnostic.find("100"), std::string::npos) << outcome->diagnostic;
  }
  EXPECT_EQ(recv->sizes[1], Side::page);
  EXPECT_TRUE(std::ranges::equal(b.page_at(2), a.page_at(2)));
}

TEST(LaneProtocol, CountMismatchEndsBothAndLeavesTheConnectionUsable) {
  Side a;
  Side b;
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  a.start(request(TransferKind::send, {a.page_at(0), a.page_at(1)}), send);
  b.start(request(TransferKind::recv, {b.page_at(0)}), recv);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(send->ec, errc::count_mismatch);
  EXPECT_EQ(recv->ec, errc::count_mismatch);
  const auto again = std::make_shared<Outcome>();
  a.start(request(TransferKind::write, {a.page_at(0)}, {5}), again);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(again->count, 1U);
}

TEST(LaneProtocol, Line18_ANotificationFollowsAllOfItsData) {
  Side a;
  Side b;
  fill(a.memory, 5);
  for (const std::size_t count : {std::size_t{1}, Side::pages}) {
    b.host->notifications.clear();
    auto write = request(TransferKind::write, {}, {});
    for (std::size_t i = 0; i < count; ++i) {
      write.objects.push_back(a.page_at(i));
      write.remote_indexes.push_back(i);
    }
    write.notification.assign(3, std::byte{9});
    const auto outcome = std::make_shared<Outcome>();
    a.start(std::move(write), outcome);
    // Byte by byte at the end of each step: the notification must not be there before the last page is.
    while (outcome->calls == 0) {
      ASSERT_FALSE(b.feed(a.take(100'000)));
      if (!b.host->notifications.empty()) {
        ASSERT_TRUE(std::equal(a.memory.begin(), a.memory.begin() + static_cast<std::ptrdiff_t>(count * Side::page),
                               b.memory.begin()));
      }
      ASSERT_FALSE(a.feed(b.take(100'000)));
    }
    EXPECT_FALSE(outcome->ec);
    EXPECT_EQ(b.host->notifications.size(), 1U);
  }
}

TEST(LaneProtocol, WhatHandlersMayWaitForIsCounted) {
  Side a;
  Side b;
  const auto outcome = std::make_shared<Outcome>();
  a.start(request(TransferKind::write, {a.page_at(0)}, {1}), outcome);
  EXPECT_EQ(a.protocol->completed(), 0U);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(a.protocol->completed(), 1U);
  EXPECT_EQ(b.protocol->completed(), 0U) << "nobody there waits for the end of a peer's write";

  auto notifying = request(TransferKind::write, {a.page_at(0)}, {1});
  notifying.notification = {std::byte{1}};
  a.start(std::move(notifying), std::make_shared<Outcome>());
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(b.protocol->completed(), 1U);
}

TEST(LaneProtocol, AFullNotificationQueueIsTheWritersError) {
  Side a;
  Side b;
  b.host->notification_limit = 0;
  for (const std::size_t count : {std::size_t{1}, Side::pages}) {
    auto write = request(TransferKind::write, {}, {});
    for (std::size_t i = 0; i < count; ++i) {
      write.objects.push_back(a.page_at(i));
      write.remote_indexes.push_back(i);
    }
    write.notification.assign(3, std::byte{9});
    const auto outcome = std::make_shared<Outcome>();
    a.start(std::move(write), outcome);
    ASSERT_FALSE(settle(a, b));
    EXPECT_EQ(outcome->ec, errc::resource_limit);
    EXPECT_EQ(outcome->count, count);
  }
}

TEST(LaneProtocol, Line13_AStoppedReadIsQuietInTheMiddleOfItsData) {
  Side a;
  Side b;
  fill(b.memory, 6);
  auto read = request(TransferKind::read, {}, {});
  for (std::size_t i = 0; i < 200; ++i) {
    read.objects.push_back(a.page_at(i));
    read.remote_indexes.push_back(i);
  }
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = a.start(std::move(read), outcome);
  ASSERT_FALSE(b.feed(a.take(100'000)));
  ASSERT_FALSE(a.feed(b.take(100'000)));  // a part of the answer, ending within a page
  a.stop(*operation);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  const auto quiet = a.memory;
  ASSERT_FALSE(settle(a, b));
  EXPECT_TRUE(kvferry::testing::same_bytes(a.memory, quiet));

  const auto next = std::make_shared<Outcome>();
  a.start(request(TransferKind::read, {a.page_at(500)}, {7}), next);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(next->count, 1U);
  EXPECT_TRUE(std::ranges::equal(a.page_at(500), b.page_at(7)));
}

TEST(LaneProtocol, Line13_AStoppedWriteDrainsTheFrameThatIsHalfOut) {
  Side a;
  Side b;
  std::vector<std::byte> large(8 * max_chunk_bytes);
  std::vector<std::byte> target(8 * max_chunk_bytes);
  const auto send = std::make_shared<Outcome>();
  const auto recv = std::make_shared<Outcome>();
  b.start(request(TransferKind::recv, {MutableBuffer(target)}), recv);
  const auto operation = a.start(request(TransferKind::send, {MutableBuffer(large)}), send);
  ASSERT_FALSE(a.feed(b.take(1000)));
  ASSERT_FALSE(b.feed(a.take(100'000)));
  EXPECT_FALSE(a.protocol->draining_since());
  a.stop(*operation);
  EXPECT_TRUE(a.protocol->draining_since());
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(a.protocol->draining_since());
  EXPECT_EQ(recv->ec, errc::peer_cancelled);
  EXPECT_EQ(recv->calls, 1);
}

TEST(LaneProtocol, ACancelledRecvGivesItsSendToTheNextOne) {
  Side a;
  Side b;
  fill(a.memory, 7);
  const auto first = std::make_shared<Outcome>();
  const auto operation = b.start(request(TransferKind::recv, {b.page_at(0)}), first);
  ASSERT_FALSE(settle(a, b));
  b.stop(*operation);
  ASSERT_FALSE(settle(a, b));
  const auto send = std::make_shared<Outcome>();
  const auto second = std::make_shared<Outcome>();
  a.start(request(TransferKind::send, {a.page_at(3)}), send);
  b.start(request(TransferKind::recv, {b.page_at(1)}), second);
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(first->ec, errc::cancelled);
  EXPECT_EQ(send->count, 1U);
  EXPECT_EQ(second->count, 1U);
  EXPECT_TRUE(std::ranges::equal(b.page_at(1), a.page_at(3)));
}

TEST(LaneProtocol, ASendWhoseRecvIsGoneGoesToTheNextOneWhateverOfItWasSent) {
  for (const std::size_t sent : {0UL, 10UL, 5000UL, 1'500'000UL}) {
    Side a;
    Side b;
    std::vector<std::byte> large(3 * max_chunk_bytes);
    std::vector<std::byte> gone(large.size());
    std::vector<std::byte> target(large.size());
    fill(large, 12);
    const auto send = std::make_shared<Outcome>();
    const auto first = std::make_shared<Outcome>();
    const auto second = std::make_shared<Outcome>();
    const auto operation = b.start(request(TransferKind::recv, {MutableBuffer(gone)}), first);
    ASSERT_FALSE(a.feed(b.take(1000)));
    a.start(request(TransferKind::send, {MutableBuffer(large)}), send);
    if (sent != 0) {
      ASSERT_FALSE(b.feed(a.take(sent)));
    }
    b.stop(*operation);
    const auto quiet = gone;
    ASSERT_FALSE(settle(a, b));
    EXPECT_EQ(send->calls, 0);
    b.start(request(TransferKind::recv, {MutableBuffer(target)}), second);
    ASSERT_FALSE(settle(a, b));
    EXPECT_EQ(first->ec, errc::cancelled);
    EXPECT_EQ(send->calls, 1);
    EXPECT_EQ(send->count, 1U) << send->diagnostic;
    EXPECT_EQ(second->count, 1U);
    EXPECT_EQ(target, large);
    EXPECT_EQ(gone, quiet);
  }
}

TEST(LaneProtocol, FailEndsEverythingOnceWithItsCause) {
  Side a;
  Side b;
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (const auto kind : {TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv}) {
    outcomes.push_back(std::make_shared<Outcome>());
    a.start(request(kind, {a.page_at(0)},
                    kind == TransferKind::write || kind == TransferKind::read ? std::vector<std::uint64_t>{1}
                                                                              : std::vector<std::uint64_t>{}),
            outcomes.back());
  }
  (void)a.take(100);
  a.protocol->fail(errc::connection_lost, "cut");
  outcomes.push_back(std::make_shared<Outcome>());
  a.start(request(TransferKind::write, {a.page_at(0)}, {1}), outcomes.back());
  for (const auto& outcome : outcomes) {
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->ec, errc::connection_lost);
    EXPECT_EQ(outcome->count, 0U);
  }
}

TEST(LaneProtocol, Line13_AStoppedWriteOfWhichNothingIsOutIsTakenBack) {
  Side a;
  Side b;
  fill(a.memory, 11);
  const auto first = std::make_shared<Outcome>();
  const auto second = std::make_shared<Outcome>();
  const auto third = std::make_shared<Outcome>();
  a.start(request(TransferKind::write, {a.page_at(0)}, {0}), first);
  const auto operation = a.start(request(TransferKind::write, {a.page_at(1)}, {1}), second);
  a.start(request(TransferKind::write, {a.page_at(2)}, {2}), third);
  a.protocol->fill(1 << 20);  // all three are in the outgoing queue
  ASSERT_FALSE(b.feed(a.take(10)));
  a.stop(*operation);
  EXPECT_FALSE(a.protocol->draining_since());
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(first->count, 1U);
  EXPECT_EQ(second->ec, errc::cancelled);
  EXPECT_EQ(third->count, 1U);
  EXPECT_TRUE(std::ranges::equal(a.page_at(0), b.page_at(0)));
  EXPECT_TRUE(std::ranges::all_of(b.page_at(1), [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_TRUE(std::ranges::equal(a.page_at(2), b.page_at(2)));
}

TEST(LaneProtocol, Line15_MoreChunksThanTheWindowHoldsFlowAllTheSame) {
  Side a;
  Side b;
  fill(a.memory, 8);
  constexpr std::size_t operations = 3 * max_unacknowledged;
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (std::size_t i = 0; i < operations; ++i) {
    outcomes.push_back(std::make_shared<Outcome>());
    a.start(request(i % 2 == 0 ? TransferKind::write : TransferKind::read, {a.page_at(i % Side::pages, 64)},
                    {i % Side::pages}),
            outcomes.back());
  }
  ASSERT_FALSE(settle(a, b));
  for (const auto& outcome : outcomes) {
    ASSERT_EQ(outcome->calls, 1);
    ASSERT_EQ(outcome->count, 1U);
  }
}

TEST(LaneProtocol, ItIsUsedByWhatEitherSideHasStartedAndWhileAnOperationWaits) {
  Side a;
  Side b;
  a.protocol->probe([] {});
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(a.protocol->take_used() || b.protocol->take_used()) << "a probe is no use";
  const auto write = std::make_shared<Outcome>();
  a.start(request(TransferKind::write, {a.page_at(0)}, {5}), write);
  ASSERT_FALSE(settle(a, b));
  ASSERT_EQ(write->count, 1U);
  EXPECT_TRUE(a.protocol->take_used() && b.protocol->take_used());
  EXPECT_FALSE(a.protocol->take_used() || b.protocol->take_used()) << "since it was asked last";
  const auto recv = std::make_shared<Outcome>();
  b.start(request(TransferKind::recv, {b.page_at(0)}), recv);
  ASSERT_FALSE(settle(a, b));
  EXPECT_TRUE(a.protocol->take_used());
  EXPECT_FALSE(a.protocol->take_used()) << "else a peer's recv that nobody meets would hold a place for ever";
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(b.protocol->take_used()) << "its own recv waits";
  }
}

TEST(LaneProtocol, AProbeIsAnsweredOnceAndInItsTurn) {
  Side a;
  Side b;
  std::string answered;
  a.protocol->probe([&] { answered += "first "; });
  a.protocol->probe([&] { answered += "second "; });
  EXPECT_FALSE(settle(a, b));
  EXPECT_EQ(answered, "first second ");
  a.protocol->probe([&] { answered += "third"; });
  EXPECT_EQ(answered, "first second ") << "answered before the peer has said anything";
  EXPECT_FALSE(settle(a, b));
  EXPECT_EQ(answered, "first second third");
}

TEST(LaneProtocol, AProbeOfAConnectionThatBreaksIsNeverAnswered) {
  Side a;
  bool answered = false;
  a.protocol->probe([&] { answered = true; });
  a.protocol->fail(errc::connection_lost, "the test says so");
  a.protocol->probe([&] { answered = true; });
  EXPECT_FALSE(answered);
}

TEST(LaneProtocol, NoMoreProbesAreAskedThanThePeerHasToAnswer) {
  Side a;
  Side b;
  std::size_t answered = 0;
  for (std::size_t i = 0; i < 3 * max_outstanding_probes; ++i) {
    a.protocol->probe([&] { ++answered; });
  }
  EXPECT_FALSE(settle(a, b));
  EXPECT_EQ(answered, max_outstanding_probes);
}

}  // namespace
}  // namespace kvferry::tcp::testing
