// SPDX-License-Identifier: Apache-2.0
// Checksums on a rail: what they find, and what is compared.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/same_bytes.hpp"
#include "rdma/rail_checksums.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

TEST_F(RailProtocolChecksums, EveryKindMovesTheRightBytes) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    for (const std::size_t count : {1U, 23U, 24U, 25U, 2000U}) {
      SCOPED_TRACE(std::string(to_string(kind)) + " of " + std::to_string(count));
      std::ranges::reverse(a.memory);
      const auto outcome = std::make_shared<Outcome>();
      a.start(with_checksums(one_sided(kind, cut(a, count, page), rising(count), {std::byte{1}})), outcome);
      run();
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_EQ(outcome->count, count) << outcome->ec.message();
      EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, count * page), b.at(0, count * page)));
    }
  }
  EXPECT_EQ(b.host->notifications.size(), 10U);
  for (const std::size_t size : {std::size_t{100}, eager_bytes + 1, mebibyte + 4097}) {
    const std::size_t count = 3;
    const auto sent = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    a.start(paired(TransferKind::send, cut(a, count, size), 1), sent);
    b.start(with_checksums(paired(TransferKind::recv, cut(b, count, size), 1)), received);
    run();
    EXPECT_EQ(sent->count, count) << sent->ec.message();
    EXPECT_EQ(received->count, count) << received->ec.message();
    EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, count * size), b.at(0, count * size)));
  }
  EXPECT_EQ(a.host->differed + b.host->differed, 0U);
  EXPECT_TRUE(a.protocol->idle());
  EXPECT_TRUE(b.protocol->idle());
}

TEST_F(RailProtocolChecksums, RangesStridesEmptyAndLargeObjects) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    for (const bool damaged : {false, true}) {
      TransferRequest request = with_checksums(one_sided(
          kind, {a.at(0, 0), a.at(100, 99 * 300 + 200), a.at(60'000, 0), a.at(mebibyte, 3 * mebibyte + 5), a.at(0, 0)},
          {}));
      request.local_strides = {{}, {200, 300}, {}, {}, {}};
      request.remote_ranges = {RemoteRange::contiguous(0, 0, 0), RemoteRange::strided(0, 7, 50, 64, 400),
                               RemoteRange::strided(0, 5, 10, 10, 0),
                               RemoteRange::contiguous(0, 100'001, 3 * mebibyte + 5), RemoteRange::contiguous(0, 9, 0)};
      std::vector<std::error_code> statuses(5);
      request.statuses = statuses;
      const auto outcome = std::make_shared<Outcome>();
      a.start(std::move(request), outcome);
      (void)move();
      std::byte& last =
          kind == TransferKind::write ? b.memory[100'001 + 3 * mebibyte + 4] : a.memory[mebibyte + 3 * mebibyte + 4];
      last ^= static_cast<std::byte>(damaged ? 1 : 0);
      run();
      EXPECT_EQ(outcome->count, damaged ? 4U : 5U) << outcome->ec.message();
      EXPECT_EQ(statuses[3], damaged ? std::error_code(errc::checksum_mismatch) : std::error_code());
    }
  }
  EXPECT_EQ(a.host->differed, 1U);
  EXPECT_EQ(b.host->differed, 1U);
}

TEST_F(RailProtocolChecksums, BlocksOfRangesHaveChecksumsOfTheirOwn) {
  // Blocks that are larger than a part, that are many, and that are small; and one byte of the last block of each.
  for (const auto& [size, stride, count] : {std::tuple{mebibyte + 3, mebibyte + 64, std::size_t{3}},
                                            std::tuple{std::size_t{1}, std::size_t{2}, std::size_t{10'000}},
                                            std::tuple{std::size_t{3000}, page, std::size_t{700}}}) {
    for (const bool damaged : {false, true}) {
      TransferRequest request = with_checksums(one_sided(TransferKind::write, {a.at(0, size * count)}, {}));
      request.remote_ranges = {RemoteRange::strided(0, 11, size, stride, count)};
      const auto outcome = std::make_shared<Outcome>();
      a.start(std::move(request), outcome);
      (void)move();
      b.memory[11 + (count - 1) * stride + size - 1] ^= static_cast<std::byte>(damaged ? 0x80 : 0);
      run();
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_EQ(outcome->ec, damaged ? std::error_code(errc::checksum_mismatch) : std::error_code());
    }
  }
  EXPECT_EQ(b.host->differed, 3U) << "parts that differ, not objects";
}

TEST_F(RailProtocolChecksums, AWriteThatLandedWrongFailsAndIsToldToNobody) {
  constexpr std::size_t count = 8;
  std::vector<std::error_code> statuses(count);
  std::string diagnostic;
  TransferRequest request =
      with_checksums(one_sided(TransferKind::write, cut(a, count, page), rising(count), {std::byte{1}}));
  request.statuses = statuses;
  request.diagnostic = &diagnostic;
  const auto outcome = std::make_shared<Outcome>();
  a.start(request, outcome);
  (void)move();
  EXPECT_EQ(outcome->calls, 0) << "nobody has compared it";
  EXPECT_TRUE(b.host->notifications.empty());
  b.memory[2 * page + 1000] ^= std::byte{4};
  run();
  expect_third_differs(*outcome, statuses, diagnostic);
  EXPECT_EQ(b.host->differed, 1U);
  EXPECT_EQ(a.host->differed, 0U);
  EXPECT_TRUE(b.host->notifications.empty());

  const auto again = std::make_shared<Outcome>();
  a.start(request, again);
  run();
  EXPECT_EQ(again->count, count) << again->ec.message();
  EXPECT_EQ(b.host->notifications.size(), 1U);
}

TEST_F(RailProtocolChecksums, AReadThatLandedWrongFails) {
  constexpr std::size_t count = 8;
  std::vector<std::error_code> statuses(count);
  std::string diagnostic;
  TransferRequest request =
      with_checksums(one_sided(TransferKind::read, cut(a, count, page), rising(count), {std::byte{1}}));
  request.statuses = statuses;
  request.diagnostic = &diagnostic;
  const auto outcome = std::make_shared<Outcome>();
  a.start(std::move(request), outcome);
  (void)move();
  a.memory[2 * page] ^= std::byte{4};
  run();
  expect_third_differs(*outcome, statuses, diagnostic);
  EXPECT_EQ(a.host->differed, 1U);
  EXPECT_EQ(b.host->differed, 0U);
  EXPECT_TRUE(b.host->notifications.empty());
}

TEST_F(RailProtocolChecksums, ASendThatLandedWrongFailsOnBothSides) {
  constexpr std::size_t count = 4;
  for (const std::size_t size : {std::size_t{100}, 3 * page}) {
    std::vector<std::error_code> sent_statuses(count);
    std::vector<std::error_code> received_statuses(count);
    std::vector<std::size_t> sizes(count);
    std::string sent_diagnostic;
    std::string received_diagnostic;
    TransferRequest send = paired(TransferKind::send, cut(a, count, size), 1);
    send.statuses = sent_statuses;
    send.diagnostic = &sent_diagnostic;
    TransferRequest recv = with_checksums(paired(TransferKind::recv, cut(b, count, size), 1));
    recv.statuses = received_statuses;
    recv.sizes = sizes;
    recv.diagnostic = &received_diagnostic;
    const auto sent = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    b.start(std::move(recv), received);
    (void)move();
    a.start(std::move(send), sent);
    (void)move();
    EXPECT_EQ(sent->calls + received->calls, 0);
    b.memory[2 * size + size - 1] ^= std::byte{1};
    run();
    expect_third_differs(*sent, sent_statuses, sent_diagnostic);
    expect_third_differs(*received, received_statuses, received_diagnostic);
    EXPECT_EQ(sizes, (std::vector<std::size_t>{size, size, 0, size})) << "what differs is not to be used";
  }
  EXPECT_EQ(b.host->differed, 2U);
}

TEST_F(RailProtocolChecksums, ObjectsThatDontFitHaveNone) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  a.start(with_checksums(paired(TransferKind::send, {a.at(0, 10), a.at(0, 3 * page), a.at(0, 0), a.at(20, 30)}, 1)),
          sent);
  b.start(paired(TransferKind::recv, {b.at(0, 10), b.at(page, 17), b.at(0, 0), b.at(100, 31)}, 1), received);
  run();
  EXPECT_EQ(sent->ec, errc::buffer_too_small);
  EXPECT_EQ(received->ec, errc::buffer_too_small);
  EXPECT_EQ(sent->count, 3U);
  EXPECT_EQ(received->count, 3U);
}

TEST_F(RailProtocolChecksums, WhatABatchOverwritesIsNotCompared) {
  const auto written = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::write, cut(a, 4, page), {7, 9, 7, 8})), written);
  const auto read = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::read, {a.at(100 * page, page), a.at(100 * page + 5, page)}, {20, 21})),
          read);
  run();
  EXPECT_EQ(written->count, 4U) << written->ec.message();
  EXPECT_EQ(read->count, 2U) << read->ec.message();
  // Objects that don't overlap are.
  const auto again = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::write, cut(a, 4, page), {7, 9, 7, 8})), again);
  (void)move();
  b.memory[8 * page] ^= std::byte{1};
  run();
  EXPECT_EQ(again->ec, errc::checksum_mismatch);
  EXPECT_EQ(again->count, 3U);
  // Ranges that only interleave are.
  TransferRequest request = with_checksums(one_sided(TransferKind::write, {a.at(0, 1000), a.at(page, 1000)}, {}));
  request.remote_ranges = {RemoteRange::strided(0, 0, 100, 200, 10), RemoteRange::strided(0, 100, 100, 200, 10)};
  const auto interleaved = std::make_shared<Outcome>();
  a.start(std::move(request), interleaved);
  (void)move();
  b.memory[1999] ^= std::byte{1};
  run();
  EXPECT_EQ(interleaved->ec, errc::checksum_mismatch);
  EXPECT_EQ(interleaved->count, 1U);
}

TEST_F(RailProtocolChecksums, WhatABatchOverwritesThroughAnotherRegionIsNotCompared) {
  const std::uint32_t number = b.add_region(8 * page, 4 * page);  // in the middle of region 0
  b.protocol->region_added();
  (void)move();
  TransferRequest request = with_checksums(one_sided(TransferKind::write, cut(a, 3, page), {}));
  request.remote_ranges = {RemoteRange::contiguous(0, 9 * page + 7, page), RemoteRange::contiguous(0, 20 * page, page),
                           RemoteRange::contiguous(number, page, page)};
  const auto outcome = std::make_shared<Outcome>();
  a.start(std::move(request), outcome);
  (void)move();
  b.memory[20 * page] ^= std::byte{1};
  run();
  EXPECT_EQ(outcome->ec, errc::checksum_mismatch) << outcome->ec.message();
  EXPECT_EQ(outcome->count, 2U) << "the second, which nothing overwrites, differs";
}

TEST_F(RailProtocolChecksums, ABatchThatOverwritesItselfThroughAnotherRegionIsFound) {
  // Regions 0 and 1 share a page, region 2 lies behind them.
  const auto found = [&](std::vector<RemoteRange> ranges, TransferKind kind = TransferKind::write) {
    TransferRequest request = one_sided(kind, cut(a, ranges.size(), page), {});
    request.remote_ranges = std::move(ranges);
    return lands_on_itself(request, [](std::uint32_t number) { return number * 3 * page; });
  };
  const auto at = [](std::uint32_t region, std::size_t number) {
    return RemoteRange::contiguous(region, number * page, page);
  };
  EXPECT_TRUE(found({at(0, 3), at(1, 0)}));
  EXPECT_TRUE(found({at(1, 0), at(2, 0), at(0, 3)}));
  EXPECT_FALSE(found({at(0, 2), at(1, 0), at(2, 0)}));
  EXPECT_FALSE(found({at(2, 0), at(0, 2), at(1, 0)})) << "neither rising nor overlapping";
  EXPECT_TRUE(found({at(0, 2), at(0, 2)})) << "of one region";
  EXPECT_FALSE(found({at(0, 3), at(1, 0)}, TransferKind::read)) << "which comes from one place twice";
}

TEST_F(RailProtocolChecksums, BlocksAreToldApartUpToABound) {
  const auto found = [&](std::size_t blocks, std::size_t shift) {
    TransferRequest request = one_sided(TransferKind::write, {a.at(0, blocks), a.at(0, blocks), a.at(0, 100)}, {});
    request.remote_ranges = {RemoteRange::strided(0, 0, 1, 2, blocks), RemoteRange::strided(0, shift, 1, 2, blocks),
                             RemoteRange::contiguous(0, 8 * blocks, 100)};
    return landing_on_others(request, [](std::uint32_t) { return std::uint64_t{4096}; });
  };
  EXPECT_EQ(found(1000, 1), std::vector<bool>(3, false));
  EXPECT_EQ(found(1000, 2), (std::vector<bool>{true, true, false}));
  EXPECT_EQ(found(16'384, 1), std::vector<bool>(3, false));
  EXPECT_EQ(found(16'385, 1), (std::vector<bool>{true, true, false})) << "32,770 blocks";
  // Objects in one piece are told apart however many they are.
  std::vector<MutableBuffer> objects = cut(a, 100'000, 32);
  std::ranges::reverse(objects);
  objects.push_back(objects.front());
  const auto many = landing_on_others(one_sided(TransferKind::read, objects, rising(objects.size())), {});
  EXPECT_EQ(std::ranges::count(many, true), 2);
  EXPECT_TRUE(many.front() && many.back());
}

TEST_F(RailProtocolChecksums, AStepIsBounded) {
  const auto outcome = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::write, {a.at(0, 0)}, {0})), outcome);
  EXPECT_EQ(outcome->count, 1U) << "nothing has a checksum";
  const auto large = std::make_shared<Outcome>();
  TransferRequest request = with_checksums(one_sided(TransferKind::write, {a.at(0, 4 * mebibyte)}, {}));
  request.remote_ranges = {RemoteRange::contiguous(0, 0, 4 * mebibyte)};
  a.start(std::move(request), large);
  int steps_of_a = 0;
  int steps_of_b = 0;
  while (move() || large->calls == 0) {
    steps_of_a += a.protocol->check_step() ? 1 : 0;
    steps_of_b += b.protocol->check_step() ? 1 : 0;
  }
  EXPECT_GE(steps_of_a, 4);
  EXPECT_GE(steps_of_b, 4);
  EXPECT_EQ(large->count, 1U) << large->ec.message();
}

TEST_F(RailProtocolChecksums, AStepIsBoundedInPiecesAsWell) {
  const CheckedRange scattered{0, 1, page / 2, 0, 4096, 0};
  take(b, checksums_message<CheckedRange>({.type = MessageType::check_memory, .operation = 5},
                                          std::vector<CheckedRange>(16, scattered)));
  int steps = 0;
  while (b.protocol->check_step()) {
    ++steps;
  }
  EXPECT_GE(steps, 16);
}

}  // namespace
}  // namespace kvferry::rdma::testing
