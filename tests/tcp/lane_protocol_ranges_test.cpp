// SPDX-License-Identifier: Apache-2.0
// Byte ranges over one connection: what is said of them, and what becomes of ranges that no peer of ours would send.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "peer_block.hpp"
#include "protocol_harness.hpp"
#include <kvferry/tcp/range_descriptors.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

constexpr std::uint64_t region_bytes = Side::page * Side::pages;

Descriptor range(std::uint64_t offset, std::uint32_t length, std::uint32_t region = 0) {
  return std::bit_cast<Descriptor>(RangeDescriptor{offset, length, region});
}
Descriptor blocks(std::uint64_t stride, std::uint32_t size, std::uint32_t skip = 0) {
  return std::bit_cast<Descriptor>(BlockDescriptor{stride, size, skip});
}
constexpr std::uint32_t in_blocks = RangeDescriptor::blocks;

FrameHeader header(FrameType type, const std::vector<Descriptor>& descriptors, std::uint64_t payload) {
  FrameHeader made;
  made.type = type;
  made.flags = FrameHeader::ranges | FrameHeader::last_chunk;
  made.operation = 1;
  made.count = static_cast<std::uint32_t>(descriptors.size());
  made.payload_bytes = payload;
  return made;
}

TransferRequest ranged(TransferKind kind, std::vector<MutableBuffer> objects, std::vector<RemoteRange> ranges,
                       std::vector<LocalStride> strides = {}) {
  TransferRequest made = request(kind, std::move(objects));
  made.remote_ranges = std::move(ranges);
  made.local_strides = std::move(strides);
  return made;
}

class RangeSteps : public ::testing::TestWithParam<std::size_t> {};
INSTANTIATE_TEST_SUITE_P(Steps, RangeSteps, ::testing::Values(63, 511, 4607, 262'144));

TEST_P(RangeSteps, RandomRangesMoveEveryByteAndNoOther) {
  std::mt19937 random(static_cast<unsigned>(GetParam()));
  const auto upto = [&](std::uint64_t most) { return random() % (most + 1); };
  const int rounds = kvferry::testing::sanitized ? 4 : 20;  // byte by byte, which takes a sanitizer a minute
  for (int round = 0; round < rounds; ++round) {
    const Travel travel = all_travels[static_cast<std::size_t>(round) % all_travels.size()];
    for (const auto kind : {TransferKind::write, TransferKind::read}) {
      Ends ends(travel);
      Side& a = ends.a;
      Side& b = ends.b;
      fill(a.memory, 1);
      fill(b.memory, 2);
      auto expected_a = a.memory;
      auto expected_b = b.memory;
      std::vector<MutableBuffer> objects;
      std::vector<RemoteRange> ranges;
      std::vector<LocalStride> strides;
      std::size_t local_begin = 0;
      std::uint64_t remote_begin = 0;
      for (int i = 0; i < 40; ++i) {
        // A number of bytes that both sides' blocks divide.
        const std::uint64_t here = 1 + upto(40);
        const std::uint64_t there = 1 + upto(40);
        const std::uint64_t times = upto(30);
        const std::uint64_t bytes = here * there * times;
        const std::uint64_t remote_stride = there + upto(20);
        const std::size_t local_stride = here + upto(20);
        ranges.push_back(RemoteRange::strided(0, remote_begin + upto(9), there, remote_stride, here * times));
        strides.push_back({here, local_stride});
        const std::size_t extent = bytes == 0 ? 0 : (there * times - 1) * local_stride + here;
        objects.push_back(MutableBuffer(a.memory).subspan(local_begin, extent));
        for (std::uint64_t byte = 0; byte < bytes; ++byte) {
          const std::size_t local = local_begin + byte / here * local_stride + byte % here;
          const std::size_t remote = ranges.back().offset + byte / there * remote_stride + byte % there;
          kind == TransferKind::write ? expected_b[remote] = a.memory[local] : expected_a[local] = b.memory[remote];
        }
        local_begin += extent + upto(9);
        remote_begin += 9 + remote_stride * here * times;
        ASSERT_LE(remote_begin, region_bytes);
        ASSERT_LE(local_begin, region_bytes);
      }
      const auto outcome = std::make_shared<Outcome>();
      a.start(ends.prepared(ranged(kind, objects, ranges, strides)), outcome);
      ASSERT_FALSE(settle(a, b, GetParam())) << a.protocol->violation() << b.protocol->violation();
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
      EXPECT_EQ(outcome->count, objects.size());
      ASSERT_TRUE(kvferry::testing::same_bytes(a.memory, expected_a));
      ASSERT_TRUE(kvferry::testing::same_bytes(b.memory, expected_b));
      EXPECT_EQ(ends.fetched() != 0, travel.referred);
    }
  }
}

TEST(LaneProtocolRanges, AStridedRunCostsWhatTwoObjectsCost) {
  Side a;
  const auto said = [&](std::vector<RemoteRange> ranges, std::size_t bytes) {
    a.start(ranged(TransferKind::read, {a.page_at(0, bytes)}, std::move(ranges)), std::make_shared<Outcome>());
    std::size_t total = 0;
    for (auto sent = a.take(1 << 20); !sent.empty(); sent = a.take(1 << 20)) {
      total += sent.size();
    }
    return total;
  };
  EXPECT_EQ(said({RemoteRange::contiguous(0, 3, 64'000)}, 64'000), sizeof(FrameHeader) + sizeof(Descriptor));
  EXPECT_EQ(said({RemoteRange::strided(0, 3, 64, 100, 1000)}, 64'000), sizeof(FrameHeader) + 2 * sizeof(Descriptor));
  EXPECT_EQ(said({RemoteRange::strided(0, 3, 64, 64, 1000)}, 64'000), sizeof(FrameHeader) + sizeof(Descriptor))
      << "blocks that touch are one";
}

TEST(LaneProtocolRanges, Line11_SenselessRangesBreakTheConnectionAndTouchNothing) {
  struct Senseless {
    const char* name;
    std::vector<Descriptor> descriptors;
    std::uint64_t payload;
  };
  std::vector<Descriptor> too_many;
  for (int i = 0; i < 3; ++i) {
    too_many.push_back(range(0, 400, in_blocks));
    too_many.push_back(blocks(1, 1));
  }
  const std::vector<Senseless> table = {
      {"more than a frame's bytes", {range(0, max_chunk_bytes + 1)}, max_chunk_bytes},
      {"sums that don't add up", {range(0, 16), range(16, 15)}, 32},
      {"blocks that are not described", {range(0, 16, in_blocks)}, 16},
      {"blocks of nothing", {range(0, 16, in_blocks), blocks(8, 0)}, 16},
      {"nothing in blocks", {range(0, 0, in_blocks), blocks(8, 8)}, 0},
      {"a beginning behind the block", {range(0, 16, in_blocks), blocks(8, 8, 8)}, 16},
      {"blocks that overlap", {range(0, 16, in_blocks), blocks(7, 8)}, 16},
      {"more pieces than a frame has",
       {range(0, max_chunk_objects + 1, in_blocks), blocks(2, 1)},
       max_chunk_objects + 1},
      {"more pieces in all", too_many, 1200},
      {"more pieces behind a refused range", {range(0, 16, 77), range(0, 2000, in_blocks), blocks(2, 1)}, 2016},
  };
  for (const Senseless& hostile : table) {
    for (const auto type : {FrameType::write, FrameType::read}) {
      Side side;
      const auto before = side.memory;
      const std::vector<std::byte> payload(type == FrameType::write ? hostile.payload : 0, std::byte{0xee});
      const auto made = header(type, hostile.descriptors, hostile.payload);
      EXPECT_EQ(side.feed(frame_bytes(made, hostile.descriptors, payload)), errc::protocol_violation) << hostile.name;
      EXPECT_FALSE(side.protocol->violation().empty()) << hostile.name;
      EXPECT_TRUE(kvferry::testing::same_bytes(side.memory, before)) << hostile.name;
    }
  }
}

TEST(LaneProtocolRanges, Line11_RangesOutOfBoundsAreRefusedAndTouchNothing) {
  constexpr std::uint64_t most = ~std::uint64_t{0};
  struct Case {
    const char* name;
    std::vector<Descriptor> descriptors;
    errc expected;
  };
  const std::vector<Case> table = {
      {"no such region", {range(0, 16, 2)}, errc::unknown_region},
      {"the last region there can be", {range(0, 16, ~in_blocks)}, errc::unknown_region},
      {"region without access", {range(0, 16, 1)}, errc::access_denied},
      {"region without access, in blocks", {range(0, 16, 1 | in_blocks), blocks(8, 8)}, errc::access_denied},
      {"a byte too many", {range(region_bytes - 15, 16)}, errc::range_out_of_bounds},
      {"behind the end", {range(region_bytes + 1, 16)}, errc::range_out_of_bounds},
      {"an end that wraps", {range(most - 7, 16)}, errc::range_out_of_bounds},
      {"offset 2^64-1", {range(most, 16)}, errc::range_out_of_bounds},
      {"a last block a byte too far",
       {range(region_bytes - 23, 16, in_blocks), blocks(16, 8)},
       errc::range_out_of_bounds},
      {"stride 2^64-1", {range(0, 16, in_blocks), blocks(most, 8)}, errc::range_out_of_bounds},
      {"a stride that wraps to the beginning",
       {range(64, 16, in_blocks), blocks(most / 3 + 1, 4)},
       errc::range_out_of_bounds},
      {"a stride that wraps to the offset",
       {range(64, 16, in_blocks), blocks(most - 31, 8)},
       errc::range_out_of_bounds},
      {"a good one before", {range(0, 8), range(region_bytes, 8)}, errc::range_out_of_bounds},
  };
  for (const Case& hostile : table) {
    for (const auto type : {FrameType::write, FrameType::read}) {
      Side side;
      const auto before = side.memory;
      const std::vector<std::byte> payload(type == FrameType::write ? 16 : 0, std::byte{0xee});
      ASSERT_FALSE(side.feed(frame_bytes(header(type, hostile.descriptors, 16), hostile.descriptors, payload)))
          << hostile.name << ": " << side.protocol->violation();
      const auto answer = side.take(4096);
      ASSERT_EQ(answer.size(), sizeof(FrameHeader)) << hostile.name;
      FrameHeader answered;
      std::memcpy(&answered, answer.data(), sizeof(answered));
      EXPECT_EQ(static_cast<errc>(answered.status), hostile.expected) << hostile.name;
      EXPECT_TRUE(kvferry::testing::same_bytes(side.memory, before)) << hostile.name;
    }
  }
}

TEST(LaneProtocolRanges, Line11_RangesUpToTheirBoundsAreTaken) {
  struct Case {
    const char* name;
    std::vector<Descriptor> descriptors;
    std::vector<std::uint64_t> bytes;  ///< Where they lie.
  };
  const std::vector<Case> table = {
      {"the last bytes", {range(region_bytes - 3, 3)}, {region_bytes - 3, region_bytes - 2, region_bytes - 1}},
      {"nothing at the end", {range(region_bytes, 0)}, {}},
      {"a last block at the end",
       {range(region_bytes - 6, 4, in_blocks), blocks(4, 2)},
       {region_bytes - 6, region_bytes - 5, region_bytes - 2, region_bytes - 1}},
      {"from within a block, into one", {range(10, 4, in_blocks), blocks(5, 3, 2)}, {12, 15, 16, 17}},
      {"a stride that nobody takes", {range(10, 1, in_blocks), blocks(~std::uint64_t{0}, 3, 2)}, {12}},
  };
  for (const Case& bound : table) {
    Side side;
    const std::vector<std::byte> payload(bound.bytes.size(), std::byte{0xee});
    ASSERT_FALSE(
        side.feed(frame_bytes(header(FrameType::write, bound.descriptors, payload.size()), bound.descriptors, payload)))
        << bound.name << ": " << side.protocol->violation();
    std::vector<std::uint64_t> written;
    for (std::size_t i = 0; i < side.memory.size(); ++i) {
      if (side.memory[i] != std::byte{0}) {
        written.push_back(i);
      }
    }
    EXPECT_EQ(written, bound.bytes) << bound.name;
    const auto answer = side.take(4096);
    FrameHeader answered;
    ASSERT_EQ(answer.size(), sizeof(answered)) << bound.name;
    std::memcpy(&answered, answer.data(), sizeof(answered));
    EXPECT_EQ(answered.status, 0U) << bound.name;
  }
}

TEST(LaneProtocolRanges, WhatThePeerRefusesFailsByObject) {
  // A peer that lies about its regions: its offers were checked, its memory is smaller.
  std::vector<std::byte> small(Side::page);
  Side a;
  Side b(std::vector<MemoryRegion>{{small.data(), small.size(), Side::page, Access::read_write}});
  const std::size_t frame = max_chunk_bytes;
  std::vector<std::byte> large(frame);
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    const auto outcome = std::make_shared<Outcome>();
    a.start(ranged(kind, {MutableBuffer(large), a.page_at(0, 100)},
                   {RemoteRange::contiguous(0, 0, frame), RemoteRange::contiguous(0, 0, 100)}),
            outcome);
    ASSERT_FALSE(settle(a, b));
    EXPECT_EQ(outcome->ec, errc::range_out_of_bounds);
    EXPECT_EQ(outcome->count, 1U);
    EXPECT_EQ(outcome->statuses[0], errc::range_out_of_bounds);
    EXPECT_FALSE(outcome->statuses[1]);
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
