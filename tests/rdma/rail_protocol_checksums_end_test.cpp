// SPDX-License-Identifier: Apache-2.0
// Checksums on a rail: what waits for them, and what becomes of them when something is stopped, taken back or broken.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/same_bytes.hpp"
#include "rdma/rail_checksums.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

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
