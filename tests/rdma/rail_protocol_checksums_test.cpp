// SPDX-License-Identifier: Apache-2.0
// Checksums on a rail: what they find, what waits for them, and peers that lie about them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/patterns.hpp>

#include "common/same_bytes.hpp"
#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

constexpr std::size_t region_pages = 2048;
constexpr std::size_t mebibyte = std::size_t{1} << 20;

TransferRequest with_checksums(TransferRequest request) {
  request.checksums = true;
  return request;
}

MessageHeader first_header(const std::vector<std::byte>& message) {
  MessageHeader header;
  std::memcpy(&header, message.data(), sizeof(header));
  return header;
}

template <class Entry>
std::vector<std::byte> checksums_message(MessageHeader header, const std::vector<Entry>& entries) {
  header.count = header.count != 0 ? header.count : static_cast<std::uint32_t>(entries.size());
  header.body_bytes = static_cast<std::uint32_t>(entries.size() * sizeof(Entry));
  std::vector<std::byte> message(sizeof(header) + header.body_bytes);
  std::memcpy(message.data(), &header, sizeof(header));
  if (!entries.empty()) {
    std::memcpy(message.data() + sizeof(header), entries.data(), header.body_bytes);
  }
  return message;
}

class RailProtocolChecksums : public TwoSides {
 protected:
  RailProtocolChecksums() : TwoSides(region_pages) {
    kvferry::testing::fill(MutableBuffer(a.memory), 5);
    kvferry::testing::fill(MutableBuffer(b.memory), 6);
  }

  /// Posts, completes and takes what there is to, without comparing anything.
  bool move() {
    bool moved = false;
    for (bool busy = true; busy;) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        while (post(*from, *to)) {
          from->protocol->completed();
          receive_all(*to);
          busy = true;
        }
      }
      moved = moved || busy;
    }
    return moved;
  }
  void run() {
    while (move() || a.protocol->check_step() || b.protocol->check_step()) {
    }
  }
  void take(Side& side, const std::vector<std::byte>& message) {
    EXPECT_EQ(side.protocol->received(message), std::error_code()) << side.protocol->violation();
  }
  [[nodiscard]] static std::error_code said(Side& side, const std::vector<std::byte>& message) {
    return side.protocol->received(message);
  }

  static std::vector<MutableBuffer> cut(Side& side, std::size_t count, std::size_t size, std::size_t first = 0) {
    std::vector<MutableBuffer> objects;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(side.at(first + i * size, size));
    }
    return objects;
  }
  static std::vector<std::uint64_t> rising(std::size_t count) {
    std::vector<std::uint64_t> indexes(count);
    for (std::size_t i = 0; i < count; ++i) {
      indexes[i] = i;
    }
    return indexes;
  }
  static void expect_third_differs(const Outcome& outcome, const std::vector<std::error_code>& statuses,
                                   const std::string& diagnostic) {
    EXPECT_EQ(outcome.calls, 1);
    EXPECT_EQ(outcome.ec, errc::checksum_mismatch) << outcome.ec.message();
    EXPECT_EQ(outcome.count, statuses.size() - 1);
    for (std::size_t i = 0; i < statuses.size(); ++i) {
      EXPECT_EQ(statuses[i], i == 2 ? std::error_code(errc::checksum_mismatch) : std::error_code()) << i;
    }
    EXPECT_NE(diagnostic.find("object 2 "), std::string::npos) << diagnostic;
  }
};

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
  // What doesn't overlap is.
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

TEST_F(RailProtocolChecksums, AFenceAndARemovalDontOvertakeThem) {
  const auto outcome = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::write, cut(a, 1, page), {3})), outcome);
  while (post(a, b)) {
    a.protocol->completed();
  }
  bool ended = false;
  b.protocol->fence([&] { ended = true; });
  (void)move();
  a.protocol->begin_fences(a.protocol->fences_asked());
  (void)move();
  EXPECT_FALSE(ended) << "the write has not been compared";
  run();
  EXPECT_TRUE(ended);
  EXPECT_EQ(outcome->count, 1U);
}

TEST_F(RailProtocolChecksums, OfARegionThatIsGoneNothingIsCompared) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    const std::uint32_t number = b.add_region(8 * page, 4 * page);
    b.protocol->region_added();
    (void)move();
    TransferRequest request = with_checksums(one_sided(kind, cut(a, 1, page), {0}));
    request.remote_region = number;
    const auto outcome = std::make_shared<Outcome>();
    a.start(std::move(request), outcome);
    while (move() || a.protocol->check_step()) {
    }
    EXPECT_EQ(outcome->calls, 0);
    bool gone = false;
    b.take_region_back(number);
    b.protocol->region_removed(number, [&] { gone = true; });
    run();
    EXPECT_TRUE(gone);
    EXPECT_EQ(outcome->ec, errc::region_gone) << outcome->ec.message();
    EXPECT_EQ(outcome->count, 0U);
  }
}

TEST_F(RailProtocolChecksums, WhatIsStoppedEndsAtOnceAndLateAnswersCountForNothing) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    const auto outcome = std::make_shared<Outcome>();
    const auto operation = a.start(with_checksums(one_sided(kind, cut(a, 100, page), rising(100))), outcome);
    while (move() || a.protocol->check_step()) {
    }
    operation->request_stop(errc::timed_out);
    EXPECT_EQ(outcome->calls, 1) << "its buffers are quiet";
    EXPECT_EQ(outcome->ec, errc::timed_out);
    EXPECT_EQ(outcome->count, 0U);
    run();
    const auto next = std::make_shared<Outcome>();
    a.start(with_checksums(one_sided(kind, cut(a, 100, page), rising(100))), next);
    run();
    EXPECT_EQ(next->count, 100U) << next->ec.message();
  }
}

TEST_F(RailProtocolChecksums, ASendWhoseRecvIsStoppedBeforeItIsComparedGoesToTheNext) {
  for (const std::size_t size : {std::size_t{100}, 3 * page}) {
    const auto sent = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    const auto recv = b.start(paired(TransferKind::recv, cut(b, 4, size), 1), received);
    a.start(with_checksums(paired(TransferKind::send, cut(a, 4, size), 1)), sent);
    while (move() || a.protocol->check_step()) {
    }
    EXPECT_EQ(received->calls, 0);
    recv->request_stop(errc::cancelled);
    EXPECT_EQ(received->calls, 1) << "all of it has come";
    run();
    EXPECT_EQ(sent->calls, 0);
    const auto again = std::make_shared<Outcome>();
    b.start(with_checksums(paired(TransferKind::recv, cut(b, 4, size, 20 * page), 1)), again);
    run();
    EXPECT_EQ(sent->count, 4U) << sent->ec.message();
    EXPECT_EQ(again->count, 4U) << again->ec.message();
    EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, 4 * size), b.at(20 * page, 4 * size)));
  }
}

TEST_F(RailProtocolChecksums, ASendThatLosesItsRecvBeforeItTellsThemBeginsAnew) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  const auto recv = b.start(paired(TransferKind::recv, cut(b, 4, 100), 1), received);
  a.start(with_checksums(paired(TransferKind::send, cut(a, 4, 100), 1)), sent);
  (void)move();
  recv->request_stop(errc::cancelled);
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  (void)a.protocol->check_step();  // they are ready to be told
  receive_all(a);                  // that nobody waits for them
  run();
  EXPECT_EQ(sent->calls, 0);
  const auto again = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 4, 100, page), 1), again);
  run();
  EXPECT_EQ(sent->count, 4U) << sent->ec.message();
  EXPECT_EQ(again->count, 4U) << again->ec.message();
}

TEST_F(RailProtocolChecksums, ASendThatIsStoppedBetweenItsDataAndItsEndLeavesNothing) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 4, 3 * page), 1), received);
  const auto send = a.start(with_checksums(paired(TransferKind::send, cut(a, 4, 3 * page), 1)), sent);
  (void)move();
  send->request_stop(errc::timed_out);
  run();
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, errc::timed_out) << sent->ec.message();
  EXPECT_EQ(received->ec, errc::peer_cancelled) << received->ec.message();
  EXPECT_TRUE(a.protocol->idle());
  EXPECT_TRUE(b.protocol->idle());
}

TEST_F(RailProtocolChecksums, ASendThatIsStoppedWhileThePeerHasMuchToCompareEndsAtOnce) {
  for (const std::size_t size : {std::size_t{100}, 3 * page}) {
    const auto sent = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    b.start(paired(TransferKind::recv, cut(b, 4, size), 1), received);
    const auto send = a.start(with_checksums(paired(TransferKind::send, cut(a, 4, size), 1)), sent);
    while (move() || a.protocol->check_step()) {
    }
    EXPECT_EQ(sent->calls + received->calls, 0) << "told, and not compared";
    send->request_stop(errc::timed_out);
    (void)move();
    EXPECT_EQ(sent->calls, 1);
    EXPECT_EQ(sent->ec, errc::timed_out) << sent->ec.message();
    EXPECT_EQ(sent->count, 0U);
    EXPECT_EQ(received->ec, errc::peer_cancelled) << received->ec.message();
    EXPECT_EQ(received->count, 0U);
    EXPECT_FALSE(a.protocol->draining_since());
    run();
    EXPECT_TRUE(a.protocol->idle());
    EXPECT_TRUE(b.protocol->idle());
  }
}

TEST_F(RailProtocolChecksums, ASendThatIsStoppedAfterItWasComparedHasSucceeded) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 4, 100), 1), received);
  const auto send = a.start(with_checksums(paired(TransferKind::send, cut(a, 4, 100), 1)), sent);
  while (move() || a.protocol->check_step()) {
  }
  (void)b.protocol->check_step();
  EXPECT_EQ(received->count, 4U);
  send->request_stop(errc::timed_out);
  run();
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->count, 4U) << sent->ec.message();
  EXPECT_TRUE(a.protocol->idle());
  EXPECT_TRUE(b.protocol->idle());
}

TEST_F(RailProtocolChecksums, AStoppedRecvThatIsCompleteNeedsNoEndOfTheRail) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  const auto recv = b.start(paired(TransferKind::recv, cut(b, 4, 3 * page), 1), received);
  (void)move();
  a.start(with_checksums(paired(TransferKind::send, cut(a, 4, 3 * page), 1)), sent);
  const auto post_all = [&](Side& from, Side& to) {
    while (post(from, to)) {
      from.protocol->completed();
    }
  };
  do {
    post_all(a, b);
  } while (a.protocol->check_step());
  recv->request_stop(errc::cancelled);
  post_all(b, a);
  receive_all(a);
  receive_all(b);
  EXPECT_EQ(received->calls, 0);
  EXPECT_FALSE(b.protocol->cut_off(kit::Clock::now()));
  EXPECT_EQ(received->calls, 1);
  EXPECT_EQ(received->ec, errc::cancelled) << received->ec.message();
  run();
  const auto again = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 4, 3 * page), 1), again);
  run();
  EXPECT_EQ(sent->count, 4U) << sent->ec.message();
  EXPECT_EQ(again->count, 4U) << again->ec.message();
}

TEST_F(RailProtocolChecksums, APeerWithoutThemIsToldApart) {
  b.checks = 0;
  a.join(b);
  for (auto request :
       {one_sided(TransferKind::write, cut(a, 1, page), {0}), one_sided(TransferKind::read, cut(a, 1, page), {0}),
        paired(TransferKind::send, cut(a, 1, page), 1), paired(TransferKind::recv, cut(a, 1, page), 1)}) {
    const auto outcome = std::make_shared<Outcome>();
    a.start(with_checksums(std::move(request)), outcome);
    EXPECT_EQ(outcome->ec, errc::not_supported);
  }
  EXPECT_TRUE(a.protocol->idle());
  EXPECT_EQ(said(a, checksums_message<CheckedRange>({.type = MessageType::check_memory}, {{0, 1, 0, 0, 1, 0}})),
            errc::protocol_violation);
}

TEST_F(RailProtocolChecksums, AWriteNeedsARegionThatMayBeRead) {
  const RegionKeys first{address_of(b.memory.data()), b.memory.size(), {1}};
  a.link_regions = std::make_shared<LinkRegions>(
      a.rails, [](std::size_t, std::uint32_t) { return std::nullopt; },
      std::vector<PeerRegion>{{0, page, {first, first}, Access::write}}, 1);
  RailTerms terms;
  terms.peer_buffers = terms.own_buffers = buffers;
  terms.queue_depth = queue_depth;
  terms.request.pieces = 4;
  terms.checks = max_checks;
  a.protocol.emplace(a.host, a.link_regions, 0, MessageSlots{a.slots.data(), slot_count, small_message, 2}, terms,
                     a.look);
  const auto outcome = std::make_shared<Outcome>();
  a.start(with_checksums(one_sided(TransferKind::write, cut(a, 1, page), {0})), outcome);
  EXPECT_EQ(outcome->ec, errc::access_denied);
}

TEST_F(RailProtocolChecksums, ThePeersAccessIsCheckedByItsOwner) {
  const auto ask = [&](Access access, bool written, CheckedRange range) {
    b.protocol->fail(errc::closed, "the next one's turn");
    b.join(a);
    std::vector<std::byte> memory(4 * page, std::byte{7});
    const std::uint32_t number =
        b.host->regions.add({memory.data(), memory.size(), page, access}, [](const LocalRegion&) {});
    range.region += number;
    take(b, checksums_message<CheckedRange>({.type = MessageType::check_memory,
                                             .flags = written ? MessageHeader::checked : std::uint8_t{0},
                                             .operation = 77},
                                            {range}));
    while (b.protocol->check_step()) {
    }
    EXPECT_TRUE(post(b, a));
    b.protocol->completed();
    b.take_region_back(number);
    const MessageHeader answer = first_header(a.arrived.back());
    a.arrived.clear();
    EXPECT_EQ(answer.type, MessageType::check_answer);
    EXPECT_EQ(answer.operation, 77U);
    EXPECT_EQ(answer.count, 1U);
    EXPECT_EQ(answer.status != 0 ? answer.first : 0, 0U) << "no bits beside an error";
    return answer;
  };
  const CheckedRange good{0, page, 0, 0, 1, 0};
  EXPECT_EQ(ask(Access::read_write, true, good).first, 1U);
  EXPECT_EQ(ask(Access::read, false, good).first, 1U);
  const auto status = [&](Access access, bool written, const CheckedRange& range) {
    return std::error_code(static_cast<errc>(ask(access, written, range).status));
  };
  EXPECT_EQ(status(Access::write, true, good), errc::access_denied) << "bytes could be guessed";
  EXPECT_EQ(status(Access::write, false, good), errc::access_denied);
  EXPECT_EQ(status(Access::read, true, good), errc::access_denied);
  EXPECT_EQ(status(Access::none, false, good), errc::access_denied);
  EXPECT_EQ(status(Access::read_write, true, {0, page, 0, 9, 1, 0}), errc::unknown_region);
  constexpr std::uint64_t most = ~std::uint64_t{0};
  for (const CheckedRange& beyond :
       {CheckedRange{3 * page + 1, page, 0, 0, 1, 0}, CheckedRange{most, page, 0, 0, 1, 0},
        CheckedRange{most - page + 1, page, 0, 0, 1, 0}, CheckedRange{0, 5 * page, 0, 0, 1, 0},
        CheckedRange{0, page, page, 0, 5, 0}, CheckedRange{page, page, page, 0, 4, 0},
        CheckedRange{0, page, most, 0, 2, 0}, CheckedRange{0, page, most / 3 + 1, 0, 4, 0},
        CheckedRange{2 * page, page, most - page + 1, 0, 2, 0}}) {
    EXPECT_EQ(status(Access::read_write, true, beyond), errc::range_out_of_bounds)
        << beyond.offset << ' ' << beyond.size << ' ' << beyond.stride << ' ' << beyond.count;
  }
  EXPECT_EQ(ask(Access::read_write, true, {0, page, page, 0, 4, 0}).status, 0U);
}

TEST_F(RailProtocolChecksums, SenselessMessagesBreakTheRail) {
  const auto memory = [](const std::vector<CheckedRange>& ranges, std::uint32_t count = 0) {
    return checksums_message({.type = MessageType::check_memory, .count = count, .operation = 5}, ranges);
  };
  const CheckedRange one{0, 1, 0, 0, 1, 0};
  const std::uint64_t most = ~std::uint64_t{0};
  for (const auto& message :
       {memory({}), memory({one}, 2), memory({one, one}, 1), memory({{0, 0, 0, 0, 1, 0}}), memory({{0, 1, 0, 0, 0, 0}}),
        memory({{0, mebibyte + 1, 0, 0, 1, 0}}), memory({{0, most, 0, 0, 1, 0}}),
        memory({{0, mebibyte, mebibyte, 0, 2, 0}}), memory({{0, 1, 2, 0, 4097, 0}}), memory({{0, 2, 1, 0, 2, 0}}),
        memory(std::vector<CheckedRange>(17, {0, mebibyte, 0, 0, 1, 0})),
        memory(std::vector<CheckedRange>(129, one))}) {
    EXPECT_EQ(said(b, message), errc::protocol_violation);
    EXPECT_FALSE(b.protocol->violation().empty());
  }
  // No more than were offered.
  for (std::size_t i = 0; i < max_checks; ++i) {
    take(b, memory({one}));
  }
  EXPECT_EQ(said(b, memory({one})), errc::protocol_violation);
  EXPECT_EQ(said(b, checksums_message<CheckedPart>({.type = MessageType::check_recv, .tag = 1}, {{1, 0}})),
            errc::protocol_violation);
}

TEST_F(RailProtocolChecksums, AnswersThatNobodyAskedForBreakTheRail) {
  const auto answer = [](std::uint64_t to, std::uint32_t count, errc status = {}) {
    return checksums_message<CheckedRange>({.type = MessageType::check_answer,
                                            .count = count,
                                            .operation = to,
                                            .status = static_cast<std::uint32_t>(status)},
                                           {});
  };
  EXPECT_EQ(said(a, answer(1, 1)), errc::protocol_violation);
  for (const auto& [off, count, status] :
       {std::tuple{1U, 4U, errc{}}, std::tuple{0U, 3U, errc{}}, std::tuple{0U, 4U, errc::timed_out},
        std::tuple{0U, 4U, errc::peer_cancelled}}) {
    const auto outcome = std::make_shared<Outcome>();
    a.start(with_checksums(one_sided(TransferKind::write, cut(a, 4, page), rising(4))), outcome);
    while (a.protocol->check_step() || post(a, b)) {
      if (!list_->empty()) {
        a.protocol->completed();
        list_->clear();
      }
    }
    ASSERT_FALSE(b.arrived.empty());
    const MessageHeader question = first_header(b.arrived.back());
    ASSERT_EQ(question.type, MessageType::check_memory);
    EXPECT_EQ(said(a, answer(question.operation + off, count, status)), errc::protocol_violation);
    a.protocol->fail(errc::protocol_violation, "lies");
    EXPECT_EQ(outcome->count, 0U);
    b.arrived.clear();
    a.join(b);
  }
}

TEST_F(RailProtocolChecksums, WhatCouldntBeComparedHasNotLandedWhateverFollows) {
  const auto answer = [](const MessageHeader& question, errc status) {
    return checksums_message<CheckedRange>({.type = MessageType::check_answer,
                                            .count = question.count,
                                            .operation = question.operation,
                                            .status = static_cast<std::uint32_t>(status)},
                                           {});
  };
  for (const bool stopped : {false, true}) {
    for (const std::size_t failing : {std::size_t{0}, std::size_t{1}}) {
      SCOPED_TRACE(std::to_string(failing) + (stopped ? ", stopped" : ""));
      // As many as two messages have room for; and what comes of them before the adapter has completed the last list.
      constexpr std::size_t in_a_message = (small_message - sizeof(MessageHeader)) / sizeof(CheckedRange);
      constexpr std::size_t count = 2 * in_a_message;
      std::vector<std::error_code> statuses(count);
      TransferRequest request = with_checksums(one_sided(TransferKind::write, cut(a, count, page), rising(count)));
      request.statuses = statuses;
      const auto outcome = std::make_shared<Outcome>();
      a.depth = 256;
      a.join(b);
      const auto operation = a.start(std::move(request), outcome);
      std::size_t lists = 0;
      while (post(a, b)) {
        ++lists;
      }
      while (a.protocol->check_step() || post(a, b)) {
        lists += list_->empty() ? 0U : 1U;
        list_->clear();
      }
      ASSERT_EQ(b.arrived.size(), 2U);
      const std::vector<MessageHeader> questions{first_header(b.arrived[0]), first_header(b.arrived[1])};
      b.arrived.clear();
      if (stopped) {
        operation->request_stop(errc::timed_out);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        take(a, answer(questions[i], i == failing ? errc::memory_fault : errc{}));
      }
      EXPECT_EQ(outcome->calls, 0) << "its memory is with the adapter";
      for (; lists != 0; --lists) {
        a.protocol->completed();
      }
      const std::error_code expected = stopped ? errc::timed_out : errc::memory_fault;
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_EQ(outcome->ec, expected) << outcome->ec.message();
      EXPECT_EQ(outcome->count, failing * in_a_message);
      for (std::size_t i = 0; i < count; ++i) {
        EXPECT_EQ(statuses[i], i < failing * in_a_message ? std::error_code() : expected) << i;
      }
    }
  }
}

TEST_F(RailProtocolChecksums, AnAcknowledgedSendThatIsGivenUpEndsWithWhatItsChecksumsCameTo) {
  // One object is written into the recv's buffer, one comes in a message, and one doesn't fit.
  const auto objects_of = [](Side& side, std::size_t last) {
    return std::vector{side.at(0, page), side.at(page, 100), side.at(2 * page, last)};
  };
  b.start(paired(TransferKind::recv, objects_of(b, 50), 1), std::make_shared<Outcome>());
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  std::vector<std::error_code> statuses(3);
  std::string diagnostic;
  TransferRequest request = with_checksums(paired(TransferKind::send, objects_of(a, 60), 1));
  request.statuses = statuses;
  request.diagnostic = &diagnostic;
  const auto sent = std::make_shared<Outcome>();
  const auto send = a.start(std::move(request), sent);
  while (post(a, b) || a.protocol->check_step()) {
  }
  MessageHeader ack{.type = MessageType::send_ack};
  std::size_t compared = 0;
  for (const auto& message : b.arrived) {
    const MessageHeader header = first_header(message);
    if (header.type == MessageType::send_data) {
      ack.operation = header.tag;
    } else if (header.type == MessageType::check_recv) {
      take(a, checksums_message<CheckedRange>({.type = MessageType::check_answer,
                                               .count = header.count,
                                               .operation = header.operation,
                                               .status = static_cast<std::uint32_t>(errc::memory_fault)},
                                              {}));
      compared += header.count;
    }
  }
  EXPECT_EQ(compared, 2U);
  take(a, checksums_message<CheckedPart>(ack, {}));
  EXPECT_EQ(sent->calls, 0) << "the adapter has not completed it, as far as is known here";
  send->request_stop(errc::cancelled);
  while (a.protocol->posted() != 0) {
    a.protocol->completed();
  }
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, errc::memory_fault) << sent->ec.message();
  EXPECT_EQ(sent->count, 0U) << "nobody has compared it";
  EXPECT_EQ(statuses, (std::vector<std::error_code>{errc::memory_fault, errc::memory_fault, errc::buffer_too_small}));
  EXPECT_NE(diagnostic.find("couldn't compare"), std::string::npos) << diagnostic;
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

TEST_F(RailProtocolChecksums, AStoppedSendIsNotAcknowledgedBeforeItsChecksumsWereTold) {
  b.start(paired(TransferKind::recv, cut(b, 2, 100), 1), std::make_shared<Outcome>());
  const auto outcome = std::make_shared<Outcome>();
  const auto send = a.start(with_checksums(paired(TransferKind::send, cut(a, 2, 100), 1)), outcome);
  (void)move();
  send->request_stop(errc::timed_out);
  EXPECT_EQ(said(a, checksums_message<CheckedPart>({.type = MessageType::send_ack, .operation = 2}, {})),
            errc::protocol_violation);
  a.protocol->fail(errc::protocol_violation, "lies");
  EXPECT_EQ(outcome->count, 0U);
}

TEST_F(RailProtocolChecksums, ChecksumsThatDontCoverARecvBreakTheRail) {
  const auto recv_of = [&](bool asks) {
    b.protocol->fail(errc::closed, "the next one's turn");
    b.join(a);
    TransferRequest request = paired(TransferKind::recv, {b.at(0, 100), b.at(200, 100)}, 1);
    request.checksums = asks;
    b.start(std::move(request), std::make_shared<Outcome>());
    EXPECT_TRUE(post(b, a));
    b.protocol->completed();
    const std::uint64_t id = first_header(a.arrived.back()).operation;
    a.arrived.clear();
    return id;
  };
  const auto data = [](std::uint64_t recv, std::uint8_t flags, std::uint32_t objects) {
    std::vector<std::uint64_t> entries;
    for (std::uint32_t i = 0; i < objects; ++i) {
      entries.insert(entries.end(), {8, 0x0101010101010101});
    }
    return checksums_message(
        MessageHeader{.type = MessageType::send_data, .flags = flags, .count = objects, .operation = recv, .tag = 9},
        entries);
  };
  const auto sums = [](std::uint64_t recv, std::vector<CheckedPart> parts) {
    return checksums_message(MessageHeader{.type = MessageType::check_recv, .operation = 3, .tag = recv}, parts);
  };
  constexpr std::uint8_t on = MessageHeader::checked;
  constexpr std::uint8_t ends = MessageHeader::checked | MessageHeader::last;
  std::uint64_t recv = recv_of(true);
  EXPECT_EQ(said(b, data(recv, MessageHeader::last, 2)), errc::protocol_violation) << "asked for";
  recv = recv_of(false);
  take(b, data(recv, 0, 1));
  EXPECT_EQ(said(b, data(recv, on, 1)), errc::protocol_violation) << "from the beginning or not at all";
  recv = recv_of(false);
  take(b, data(recv, 0, 1));
  EXPECT_EQ(said(b, sums(recv, {{8, 0}})), errc::protocol_violation) << "without";
  recv = recv_of(false);
  take(b, data(recv, on, 1));
  EXPECT_EQ(said(b, sums(recv, {{8, 0}, {8, 0}})), errc::protocol_violation) << "of what hasn't come";
  recv = recv_of(false);
  take(b, data(recv, on, 2));
  EXPECT_EQ(said(b, sums(recv, {{7, 0}})), errc::protocol_violation) << "of a part";
  recv = recv_of(false);
  take(b, data(recv, on, 2));
  EXPECT_EQ(said(b, sums(recv, {{0, 0}})), errc::protocol_violation);
  recv = recv_of(false);
  take(b, data(recv, on, 2));
  take(b, sums(recv, {{8, 0}}));
  EXPECT_EQ(said(b, data(recv, ends, 0)), errc::protocol_violation) << "the second has none";
  recv = recv_of(false);
  take(b, data(recv, on, 2));
  take(b, sums(recv, {{8, 0}, {8, 0}}));
  take(b, data(recv, ends, 0));
  EXPECT_EQ(said(b, sums(recv, {{8, 0}})), errc::protocol_violation) << "behind the end";
}

TEST_F(RailProtocolChecksums, AnEndBeforeItsChecksumsWereComparedBreaksTheRail) {
  const auto sent = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 2, 100), 1), std::make_shared<Outcome>());
  a.start(with_checksums(paired(TransferKind::send, cut(a, 2, 100), 1)), sent);
  while (move() || a.protocol->check_step()) {
  }
  // The send's id is the first that the side gave behind the operation's.
  EXPECT_EQ(said(a, checksums_message<CheckedPart>({.type = MessageType::send_ack, .operation = 2}, {})),
            errc::protocol_violation);
  EXPECT_NE(a.protocol->violation().find("before its checksums"), std::string::npos) << a.protocol->violation();
}

TEST_F(RailProtocolChecksums, ARailThatBreaksEndsWhatWaitsForThem) {
  const auto written = std::make_shared<Outcome>();
  const auto read = std::make_shared<Outcome>();
  const auto sent = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, cut(b, 2, 100), 1), std::make_shared<Outcome>());
  a.start(with_checksums(one_sided(TransferKind::write, cut(a, 4, page), rising(4), {std::byte{1}})), written);
  a.start(with_checksums(one_sided(TransferKind::read, cut(a, 4, page, 100 * page), rising(4))), read);
  a.start(with_checksums(paired(TransferKind::send, cut(a, 2, 100), 1)), sent);
  while (move() || a.protocol->check_step()) {
  }
  a.protocol->fail(errc::connection_lost, "gone");
  for (const auto& outcome : {written, read, sent}) {
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->count, 0U) << "nobody has compared it";
    EXPECT_TRUE(outcome->ec);
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
