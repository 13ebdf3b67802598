// SPDX-License-Identifier: Apache-2.0
// Checksums over one connection: what they find, whose status it is, and what becomes of those that no peer of ours would send.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <kvferry/tcp/checksums.hpp>
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

constexpr std::size_t whole = std::size_t{4} << 20;

TransferRequest checked(TransferRequest request) {
  request.checksums = true;
  return request;
}

/// All bytes that one side sends.
std::vector<std::byte> said_by(Side& side) {
  std::vector<std::byte> all;
  for (auto bytes = side.take(whole); !bytes.empty(); bytes = side.take(whole)) {
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

FrameHeader header_of(std::span<const std::byte> bytes) {
  FrameHeader header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  return header;
}

/// Where the payload of the first of these frames begins.
std::size_t payload_of(std::span<const std::byte> bytes) {
  return sizeof(FrameHeader) + header_of(bytes).count * sizeof(Descriptor);
}

void flip(std::byte& byte) { byte ^= std::byte{0x20}; }

class Checksums : public ::testing::Test {
 protected:
  Checksums() {
    fill(a.memory, 1);
    fill(b.memory, 2);
  }

  [[nodiscard]] std::vector<MutableBuffer> pages(Side& side, std::size_t count) {
    std::vector<MutableBuffer> objects;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(side.page_at(i));
    }
    return objects;
  }

  void expect_only_second_differs(const Outcome& result, std::size_t count) {
    EXPECT_EQ(result.calls, 1);
    EXPECT_EQ(result.ec, errc::checksum_mismatch) << result.ec.message();
    EXPECT_EQ(result.ec, condition::retryable);
    EXPECT_NE(result.ec, condition::may_still_land);
    EXPECT_EQ(result.count, count - 1);
    ASSERT_EQ(result.statuses.size(), count);
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(result.statuses[i], i == 1 ? std::error_code(errc::checksum_mismatch) : std::error_code()) << i;
    }
    EXPECT_NE(result.diagnostic.find("checksum"), std::string::npos) << result.diagnostic;
  }

  static constexpr std::size_t few_pages = 16;

  Side a{few_pages};
  Side b{few_pages};
  std::shared_ptr<Outcome> outcome = std::make_shared<Outcome>();
};

TEST_F(Checksums, AnObjectThatChangesOnTheWayFailsAloneAndNobodyIsNotified) {
  auto write = checked(request(TransferKind::write, pages(a, 3), {4, 5, 6}));
  write.notification.assign(3, std::byte{7});
  a.start(write, outcome);
  auto bytes = said_by(a);
  flip(bytes[payload_of(bytes) + Side::page + 17]);
  ASSERT_FALSE(b.feed(bytes));
  ASSERT_FALSE(settle(a, b));
  expect_only_second_differs(*outcome, 3);
  EXPECT_TRUE(b.host->notifications.empty());
  EXPECT_EQ(b.host->differed, 1U);
  EXPECT_EQ(a.host->differed, 0U);

  const auto again = std::make_shared<Outcome>();
  a.start(write, again);
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(again->ec) << again->diagnostic;
  EXPECT_EQ(b.host->notifications.size(), 1U);
}

TEST_F(Checksums, AByteThatChangesInTheReceiversMemoryBeforeTheCheckIsFound) {
  a.start(checked(request(TransferKind::write, pages(a, 3), {4, 5, 6})), outcome);
  const auto bytes = said_by(a);
  const auto all = std::span(bytes);
  ASSERT_FALSE(b.feed(all.first(bytes.size() - 1)));
  flip(b.page_at(5)[100]);
  ASSERT_FALSE(b.feed(all.last(1)));
  ASSERT_FALSE(settle(a, b));
  expect_only_second_differs(*outcome, 3);
}

TEST_F(Checksums, WithoutThemNobodyNotices) {
  a.start(request(TransferKind::write, pages(a, 3), {4, 5, 6}), outcome);
  auto bytes = said_by(a);
  EXPECT_EQ(header_of(bytes).checksums, 0U);
  flip(bytes[payload_of(bytes) + Side::page + 17]);
  ASSERT_FALSE(b.feed(bytes));
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(outcome->ec);
}

TEST_F(Checksums, AReadFindsWhatChangesOnTheWay) {
  a.start(checked(request(TransferKind::read, pages(a, 3), {4, 5, 6})), outcome);
  ASSERT_FALSE(b.feed(said_by(a)));
  auto bytes = said_by(b);
  flip(bytes[payload_of(bytes) + Side::page + 17]);
  ASSERT_FALSE(a.feed(bytes));
  expect_only_second_differs(*outcome, 3);
  EXPECT_EQ(a.host->differed, 1U);
}

TEST_F(Checksums, ASendAndItsRecvBothHearOfIt) {
  for (const bool sender_asks : {true, false}) {
    outcome = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    TransferRequest send = request(TransferKind::send, pages(a, 3));
    TransferRequest recv = request(TransferKind::recv, pages(b, 3));
    send.checksums = sender_asks;
    recv.checksums = !sender_asks;
    b.start(recv, received);
    ASSERT_FALSE(a.feed(said_by(b)));
    a.start(send, outcome);
    auto bytes = said_by(a);
    flip(bytes[payload_of(bytes) + Side::page + 17]);
    ASSERT_FALSE(b.feed(bytes));
    ASSERT_FALSE(settle(a, b));
    expect_only_second_differs(*outcome, 3);
    expect_only_second_differs(*received, 3);
  }
}

TEST_F(Checksums, RangesAndStridesAreComparedAsTheyLie) {
  // Blocks of other sizes on either side; the second object is more than a page.
  const std::vector<MutableBuffer> objects{MutableBuffer(a.memory).first(60), MutableBuffer(a.memory).subspan(100, 296),
                                           MutableBuffer(a.memory).subspan(900, 0),
                                           MutableBuffer(a.memory).subspan(1000, 40)};
  const std::vector<LocalStride> strides{{}, {24, 34}, {}, {}};
  const std::vector<RemoteRange> ranges{RemoteRange::strided(0, 3, 15, 20, 4), RemoteRange::strided(0, 200, 8, 11, 27),
                                        RemoteRange::contiguous(0, 0, 0), RemoteRange::contiguous(0, 900, 40)};
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    for (const bool flipped : {false, true}) {
      outcome = std::make_shared<Outcome>();
      auto made = checked(request(kind, objects));
      made.remote_ranges = ranges;
      made.local_strides = strides;
      a.start(made, outcome);
      Side& source = kind == TransferKind::write ? a : b;
      Side& target = kind == TransferKind::write ? b : a;
      if (kind == TransferKind::read) {
        ASSERT_FALSE(b.feed(said_by(a)));
      }
      auto bytes = said_by(source);
      ASSERT_EQ(header_of(bytes).payload_bytes, 60U + 216U + 40U);
      if (flipped) {
        flip(bytes[payload_of(bytes) + 60 + 100]);
      }
      ASSERT_FALSE(target.feed(bytes));
      ASSERT_FALSE(settle(a, b));
      if (flipped) {
        expect_only_second_differs(*outcome, 4);
      } else {
        EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
        EXPECT_EQ(outcome->count, 4U);
      }
    }
  }
}

TEST_F(Checksums, AnObjectOfSeveralFramesFailsWhicheverOfThemChanges) {
  std::vector<std::byte> large(max_chunk_bytes + 5);
  std::vector<std::byte> region(large.size());
  fill(large, 3);
  for (std::size_t frame = 0; frame < 2; ++frame) {
    Side near(few_pages);
    const auto result = std::make_shared<Outcome>();
    near.start(checked(request(TransferKind::write, {MutableBuffer(large)}, {0})), result);
    auto bytes = said_by(near);
    std::size_t at = 0;
    for (std::size_t i = 0; i < frame; ++i) {
      const auto rest = std::span(bytes).subspan(at);
      at += payload_of(rest) + header_of(rest).payload_bytes + header_of(rest).checksums * sizeof(Checksum) +
            sizeof(FrameTrailer);
    }
    flip(bytes[at + payload_of(std::span(bytes).subspan(at)) + 3]);
    Side fresh(std::vector<MemoryRegion>{{region.data(), region.size(), region.size(), Access::read_write}});
    ASSERT_FALSE(fresh.feed(bytes));
    ASSERT_FALSE(settle(near, fresh));
    EXPECT_EQ(result->ec, errc::checksum_mismatch) << frame;
    EXPECT_EQ(result->count, 0U);
    EXPECT_EQ(fresh.host->differed, 1U);
  }
}

TEST_F(Checksums, APageThatIsWrittenTwiceHoldsTheLastOfThem) {
  a.start(checked(request(TransferKind::write, pages(a, 4), {5, 6, 5, 7})), outcome);
  ASSERT_FALSE(settle(a, b));
  EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
  EXPECT_TRUE(std::ranges::equal(b.page_at(5), a.page_at(2)));
  EXPECT_EQ(b.host->differed, 0U);
}

TEST_F(Checksums, WhatDiffersIsToldOfEachOfAThousandObjects) {
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> indexes;
  for (std::size_t i = 0; i < sent_chunk_objects; ++i) {
    objects.push_back(MutableBuffer(a.memory).subspan(i % 64, 1));
    indexes.push_back(0);
  }
  // Each to its own byte, by range.
  auto write = checked(request(TransferKind::write, objects));
  for (std::size_t i = 0; i < objects.size(); ++i) {
    write.remote_ranges.push_back(RemoteRange::contiguous(0, i, 1));
  }
  a.start(write, outcome);
  auto bytes = said_by(a);
  for (std::size_t i = 0; i < objects.size(); i += 3) {
    flip(bytes[payload_of(bytes) + i]);
  }
  ASSERT_FALSE(b.feed(bytes));
  ASSERT_FALSE(settle(a, b));
  EXPECT_EQ(outcome->ec, errc::checksum_mismatch);
  for (std::size_t i = 0; i < objects.size(); ++i) {
    EXPECT_EQ(static_cast<bool>(outcome->statuses[i]), i % 3 == 0) << i;
  }
}

TEST_F(Checksums, ThoseThatDoNotAddUpBreakTheConnection) {
  a.start(checked(request(TransferKind::write, pages(a, 2), {4, 5})), outcome);
  const auto bytes = said_by(a);
  const auto header = header_of(bytes);
  ASSERT_EQ(header.checksums, 2U);
  const std::size_t sums = payload_of(bytes) + header.payload_bytes;
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{Side::page + 1}, ~std::uint64_t{0}, ~std::uint64_t{0} - Side::page + 1}) {
    auto changed = bytes;
    std::memcpy(changed.data() + sums, &length, sizeof(length));
    Side other(few_pages);
    EXPECT_EQ(other.feed(changed), errc::protocol_violation) << length;
    EXPECT_NE(other.protocol->violation().find("checksum"), std::string::npos) << other.protocol->violation();
  }
  FrameHeader bare;
  for (const FrameType type : {FrameType::notify, FrameType::write_ack, FrameType::read, FrameType::probe}) {
    bare.type = type;
    bare.checksums = 1;
    bare.count = type == FrameType::read ? 1 : 0;
    Side other(few_pages);
    EXPECT_EQ(other.feed(frame_bytes(bare, std::vector<Descriptor>(bare.count))), errc::protocol_violation);
  }
}

TEST_F(Checksums, APeerThatLeavesThemOutBreaksTheConnection) {
  a.start(checked(request(TransferKind::read, pages(a, 1), {4})), outcome);
  const auto asked = header_of(said_by(a));
  FrameHeader answer;
  answer.type = FrameType::read_data;
  answer.operation = asked.operation;
  answer.payload_bytes = Side::page;
  EXPECT_EQ(a.feed(frame_bytes(answer, {}, std::vector<std::byte>(Side::page))), errc::protocol_violation);

  Side receiver(few_pages);
  receiver.start(checked(request(TransferKind::recv, {receiver.page_at(0)})), std::make_shared<Outcome>());
  const auto posted = header_of(said_by(receiver));
  FrameHeader data;
  data.type = FrameType::send_data;
  data.flags = FrameHeader::last_chunk;
  data.operation = posted.operation;
  data.count = 1;
  data.payload_bytes = Side::page;
  const std::vector<Descriptor> object{{0, Side::page}};
  EXPECT_EQ(receiver.feed(frame_bytes(data, object, std::vector<std::byte>(Side::page))), errc::protocol_violation);
}

TEST_F(Checksums, AnAcknowledgementThatNamesOtherObjectsBreaksTheConnection) {
  const auto acknowledge = [&](std::error_code status, std::size_t descriptors, std::uint64_t objects = 1) {
    Side side(few_pages);
    side.start(checked(request(TransferKind::write, pages(side, 2), {4, 5})), std::make_shared<Outcome>());
    FrameHeader ack;
    ack.type = FrameType::write_ack;
    ack.operation = header_of(said_by(side)).operation;
    ack.status = static_cast<std::uint32_t>(status.value());
    ack.count = static_cast<std::uint32_t>(descriptors);
    return side.feed(frame_bytes(ack, std::vector<Descriptor>(descriptors, {objects, 0})));
  };
  EXPECT_FALSE(acknowledge(errc::checksum_mismatch, 1, 2));
  EXPECT_EQ(acknowledge(errc::checksum_mismatch, 1, 0), errc::protocol_violation) << "none of them";
  EXPECT_EQ(acknowledge(errc::checksum_mismatch, 1, 4), errc::protocol_violation) << "a third of two";
  EXPECT_EQ(acknowledge(errc::checksum_mismatch, 0), errc::protocol_violation);
  EXPECT_EQ(acknowledge(errc::checksum_mismatch, 2), errc::protocol_violation);
  EXPECT_EQ(acknowledge(errc::checksum_mismatch, 9), errc::protocol_violation);
  EXPECT_EQ(acknowledge({}, 1), errc::protocol_violation);
  EXPECT_EQ(acknowledge(errc::access_denied, 1), errc::protocol_violation);
}

}  // namespace
}  // namespace kvferry::tcp::testing
