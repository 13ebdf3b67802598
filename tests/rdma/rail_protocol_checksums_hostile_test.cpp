// SPDX-License-Identifier: Apache-2.0
// Checksums on a rail: who may ask for them, and peers that lie about them.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/rail_checksums.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

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
  terms.peer_buffers = terms.peer_buffers_at_first = buffers;
  terms.own_buffers = terms.own_buffers_at_first = buffers;
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
  b.own_buffers = max_messages;
  b.join(a);
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

}  // namespace
}  // namespace kvferry::rdma::testing
