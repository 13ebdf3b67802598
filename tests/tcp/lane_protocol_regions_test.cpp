// SPDX-License-Identifier: Apache-2.0
// Regions that come and go, over one connection: in which order what is said, and when nothing can touch a region any more.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

class Regions : public ::testing::Test {
 protected:
  static constexpr std::size_t page = Side::page;
  static constexpr std::uint32_t first_added = 2;  ///< Behind the two that each side has.

  Regions() : more_(16 * page) {
    a_.protocol->region_added();
    b_.protocol->region_added();
  }

  /// Adds a region to b, and has a told.
  std::uint32_t add(std::size_t begin, std::size_t pages, Access access = Access::read_write) {
    const std::uint32_t number =
        b_.host->table.add({more_.data() + begin * page, pages * page, page, access}, [](const LocalRegion&) {});
    b_.protocol->region_added();
    return number;
  }

  void remove(std::uint32_t number) {
    errc refusal{};
    ASSERT_TRUE(b_.host->table.remove(number, refusal).has_value());
    b_.protocol->region_removed(number, [this] { ++quiet_; });
  }

  std::shared_ptr<Outcome> start(TransferKind kind, std::uint32_t region, std::size_t pages = 1) {
    std::vector<MutableBuffer> objects;
    std::vector<std::uint64_t> indexes;
    for (std::size_t i = 0; i < pages; ++i) {
      objects.push_back(a_.page_at(i));
      indexes.push_back(i);
    }
    auto made = request(kind, std::move(objects), std::move(indexes));
    made.remote_region = region;
    auto outcome = std::make_shared<Outcome>();
    (void)a_.start(std::move(made), outcome);
    return outcome;
  }

  [[nodiscard]] static FrameHeader header(FrameType type, std::uint32_t region) {
    FrameHeader made;
    made.type = type;
    made.region = region;
    return made;
  }

  std::vector<std::byte> more_;
  Side a_{16};
  Side b_{16};
  int quiet_ = 0;
};

TEST_F(Regions, OneThatIsAddedIsToldAheadOfWhatIsStartedLater) {
  const std::uint32_t number = add(0, 4, Access::read);
  auto told = request(TransferKind::write, {});
  told.notification = {std::byte{7}};
  (void)b_.start(std::move(told), std::make_shared<Outcome>());
  const auto bytes = b_.take(std::size_t{1} << 20);
  ASSERT_FALSE(a_.feed(std::span(bytes).first(sizeof(FrameHeader))));
  EXPECT_TRUE(a_.host->notifications.empty());
  EXPECT_EQ(a_.host->peer_regions, (std::vector<RemoteRegion>{{4 * page, page, Access::read, number}}));
  ASSERT_FALSE(a_.feed(std::span(bytes).subspan(sizeof(FrameHeader))));
  EXPECT_EQ(a_.host->notifications.size(), 1U);
  EXPECT_EQ(number, first_added);
}

TEST_F(Regions, AnAnswerToAProbeIsBehindTheNewsOfARegionThatNobodyHasToldYet) {
  const std::uint32_t number =
      b_.host->table.add({more_.data(), page, page, Access::read_write}, [](const LocalRegion&) {});
  std::vector<RemoteRegion> known;
  a_.protocol->probe([&] { known = a_.host->peer_regions; });
  ASSERT_FALSE(settle(a_, b_));
  ASSERT_EQ(known.size(), 1U);
  EXPECT_EQ(known.front().number, number);
}

TEST_F(Regions, WhatChangedSinceTheHandshakeIsToldFirst) {
  Side late(16);
  errc refusal{};
  ASSERT_TRUE(late.host->table.remove(1, refusal).has_value());
  const auto take_more = [&] {
    return late.host->table.add({more_.data(), page, page, Access::write}, [](const LocalRegion&) {});
  };
  const std::uint32_t kept = take_more();
  const std::uint32_t gone = take_more();
  ASSERT_TRUE(late.host->table.remove(gone, refusal).has_value());
  late.protocol->region_added();
  ASSERT_FALSE(settle(late, a_));
  EXPECT_EQ(a_.host->peer_regions, (std::vector<RemoteRegion>{{page, page, Access::write, kept}}));
  EXPECT_EQ(a_.host->peer_regions_gone, (std::vector<std::uint32_t>{1, gone}));
}

TEST_F(Regions, SinceTheHandshakeAnOwnerMayHaveTakenBackAllAndAddedAsMany) {
  constexpr std::uint32_t many = 600;
  std::vector<MemoryRegion> given(many, {more_.data(), page, page, Access::read_write});
  const auto host = std::make_shared<Host>(given);
  LaneProtocol owner(host);
  errc refusal{};
  for (std::uint32_t number = 0; number < many; ++number) {
    ASSERT_TRUE(host->table.remove(number, refusal).has_value());
    host->table.gone();
  }
  for (std::uint32_t i = 0; i < many; ++i) {
    (void)host->table.add(given.front(), [](const LocalRegion&) {});
  }
  a_.host->peer_regions_now = many;
  owner.region_added();
  while (true) {
    owner.fill(std::size_t{1} << 20);
    if (owner.out().bytes() == 0) {
      break;
    }
    std::array<iovec, 64> pieces;
    const std::size_t count = owner.out().front(pieces, std::size_t{1} << 16);
    std::size_t taken = 0;
    for (const iovec& piece : std::span(pieces).first(count)) {
      const auto* const bytes = static_cast<const std::byte*>(piece.iov_base);
      ASSERT_FALSE(a_.feed(std::span(bytes, piece.iov_len))) << a_.protocol->violation();
      taken += piece.iov_len;
    }
    owner.sent(taken);
  }
  EXPECT_EQ(a_.host->peer_regions_now, many);
  EXPECT_EQ(a_.host->peer_regions_gone.size(), many);
}

TEST_F(Regions, NewAccessesToOneThatIsGoneAreRefusedAndOthersAreNot) {
  const std::uint32_t removed = add(0, 4);
  const std::uint32_t kept = add(4, 4);
  fill(a_.memory, 1);
  const auto before = start(TransferKind::write, removed);
  ASSERT_FALSE(settle(a_, b_));
  EXPECT_FALSE(before->ec);
  const std::vector<std::byte> content(more_.begin(), more_.begin() + page);
  EXPECT_TRUE(std::ranges::equal(content, a_.page_at(0)));
  remove(removed);
  fill(a_.memory, 2);
  const auto write = start(TransferKind::write, removed, 3);
  const auto read = start(TransferKind::read, removed);
  const auto other = start(TransferKind::write, kept);
  ASSERT_FALSE(settle(a_, b_));
  EXPECT_EQ(write->ec, errc::region_gone);
  EXPECT_EQ(write->count, 0U);
  EXPECT_EQ(write->statuses, (std::vector<std::error_code>(3, errc::region_gone)));
  EXPECT_EQ(read->ec, errc::region_gone);
  EXPECT_FALSE(other->ec);
  EXPECT_EQ(quiet_, 1);
  EXPECT_EQ(a_.host->peer_regions_gone, std::vector<std::uint32_t>{removed});
  EXPECT_TRUE(std::ranges::equal(content, std::span(more_).first(page))) << "written to after it was gone";
}

TEST_F(Regions, RangesInOneThatIsGoneAreRefused) {
  const std::uint32_t removed = add(0, 4);
  remove(removed);
  auto ranges = request(TransferKind::write, {a_.page_at(0)});
  ranges.remote_ranges = {RemoteRange::contiguous(removed, 0, page)};
  const auto outcome = std::make_shared<Outcome>();
  (void)a_.start(std::move(ranges), outcome);
  ASSERT_FALSE(settle(a_, b_));
  EXPECT_EQ(outcome->ec, errc::region_gone);
}

TEST_F(Regions, AWriteThatIsComingInIsLetThroughBeforeTheRegionIsQuiet) {
  const std::uint32_t removed = add(0, 8);
  ASSERT_FALSE(settle(a_, b_));
  fill(a_.memory, 3);
  const auto write = start(TransferKind::write, removed, 8);
  const auto bytes = a_.take(std::size_t{1} << 20);
  ASSERT_FALSE(b_.feed(std::span(bytes).first(5 * page)));
  remove(removed);
  ASSERT_FALSE(a_.feed(b_.take(std::size_t{1} << 20)));
  const auto answer = a_.take(std::size_t{1} << 20);
  EXPECT_EQ(quiet_, 0);
  ASSERT_FALSE(b_.feed(std::span(bytes).subspan(5 * page)));
  EXPECT_EQ(quiet_, 0);
  ASSERT_FALSE(b_.feed(answer));
  EXPECT_EQ(quiet_, 1);
  ASSERT_FALSE(settle(a_, b_));
  EXPECT_FALSE(write->ec);
  EXPECT_TRUE(std::ranges::equal(std::span(more_).first(8 * page), std::span(a_.memory).first(8 * page)));
}

TEST_F(Regions, AnswersToReadsAreSentBeforeTheRegionIsQuiet) {
  const std::uint32_t removed = add(0, 8);
  ASSERT_FALSE(settle(a_, b_));
  fill(more_, 4);
  const auto under_way = start(TransferKind::read, removed, 8);
  ASSERT_FALSE(b_.feed(a_.take(std::size_t{1} << 20)));
  ASSERT_FALSE(a_.feed(b_.take(3 * page)));  // a part of the answer has left
  remove(removed);
  const auto answer = header(FrameType::region_removed_ack, removed);
  {
    // A peer that confirms too early would have the region freed under what is still to be sent.
    Side early(16);
    const std::uint32_t number =
        early.host->table.add({more_.data(), page, page, Access::read_write}, [](const LocalRegion&) {});
    early.protocol->region_removed(number, [] {});
    EXPECT_EQ(early.feed(frame_bytes(answer)), errc::protocol_violation);
  }
  EXPECT_EQ(quiet_, 0);
  ASSERT_FALSE(settle(a_, b_, page));
  EXPECT_EQ(quiet_, 1);
  EXPECT_FALSE(under_way->ec);
  EXPECT_TRUE(std::ranges::equal(std::span(more_).first(8 * page), std::span(a_.memory).first(8 * page)));
}

TEST_F(Regions, ManyRemovalsAtATimeCountAsNoReads) {
  std::vector<std::uint32_t> numbers;
  for (std::size_t i = 0; i < 500; ++i) {
    numbers.push_back(add(0, 1));
  }
  ASSERT_FALSE(settle(a_, b_));
  for (const std::uint32_t number : numbers) {
    remove(number);
  }
  const auto read = start(TransferKind::read, 0);
  ASSERT_FALSE(settle(a_, b_)) << a_.protocol->violation() << b_.protocol->violation();
  EXPECT_FALSE(read->ec);
  EXPECT_EQ(quiet_, 500);
  EXPECT_EQ(a_.host->peer_regions_gone, numbers);
}

TEST_F(Regions, WhenTheConnectionIsGoneTheyAreQuiet) {
  const std::uint32_t removed = add(0, 4);
  remove(removed);
  EXPECT_EQ(quiet_, 0);
  b_.protocol->fail(errc::connection_lost, "the test says so");
  EXPECT_EQ(quiet_, 1);
  const std::uint32_t later = add(0, 4);
  remove(later);
  EXPECT_EQ(quiet_, 2);
}

TEST_F(Regions, SenselessNewsBreakTheConnection) {
  auto good = header(FrameType::region_added, 7);
  good.operation = 2 * page;
  good.tag = page;
  good.status = 3;
  const auto changed = [&](auto change) {
    FrameHeader made = good;
    change(made);
    return made;
  };
  const std::vector<FrameHeader> table{
      changed([](auto& made) { made.operation = 0; }),
      changed([](auto& made) { made.tag = 0; }),
      changed([](auto& made) { made.operation = page + 1; }),
      changed([](auto& made) { made.status = 4; }),
      changed([](auto& made) { made.region = std::uint32_t{1} << 31; }),
      changed([](auto& made) { made.count = 1; }),
      changed([](auto& made) { made.payload_bytes = 1; }),
      header(FrameType::region_removed, std::uint32_t{1} << 31),
      header(FrameType::region_removed_ack, 0),
  };
  for (const FrameHeader& wrong : table) {
    Side side(1);
    EXPECT_EQ(side.feed(frame_bytes(wrong)), errc::protocol_violation) << &wrong - table.data();
    EXPECT_TRUE(side.host->peer_regions.empty());
  }
  EXPECT_FALSE(a_.feed(frame_bytes(good)));
  a_.host->peer_region_limit = 1;
  EXPECT_EQ(a_.feed(frame_bytes(good)), errc::protocol_violation) << "more regions than a peer may have";
}

TEST_F(Regions, RemovalsThatNobodyCouldHaveMadeBreakTheConnection) {
  std::error_code ec;
  std::size_t taken = 0;
  while (!ec && taken <= max_outstanding_removals) {
    ec = a_.feed(frame_bytes(header(FrameType::region_removed, 5)));
    ++taken;
  }
  EXPECT_EQ(ec, errc::protocol_violation) << "answers must not pile up";
  EXPECT_EQ(taken, max_outstanding_removals + 1);
}

}  // namespace
}  // namespace kvferry::tcp::testing
