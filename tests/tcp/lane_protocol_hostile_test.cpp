// SPDX-License-Identifier: Apache-2.0
// Frames that only a hostile peer sends: line 11 of docs/fault_table.md.
#include <kvferry/tcp/lane_protocol.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/testing/traits.hpp>
#include "common/allocation_limit.hpp"
#include "fuzz/frame_maker.hpp"
#include "fuzz/lane_model.hpp"
#include "peer_block.hpp"
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Frames of a hostile peer, and how the connection ends.
struct Hostile {
  const char* name;
  FrameHeader header;
  std::vector<Descriptor> descriptors;
  std::size_t payload = 0;
};

FrameHeader header(FrameType type, std::uint32_t count = 0, std::uint64_t payload = 0) {
  FrameHeader made;
  made.type = type;
  made.operation = 1;
  made.count = count;
  made.payload_bytes = payload;
  return made;
}

/// A frame that takes part in this operation's tag.
FrameHeader of_recv(FrameType type, std::uint64_t recv, std::uint32_t count) {
  FrameHeader made = header(type, count);
  made.operation = recv;
  made.tag = 7;
  return made;
}

// The peer takes nothing, and has recvs of its come and go that one send meets again and again.
TEST(LaneProtocol, Line11_RecvsThatComeAndGoLeaveNothingBehind) {
  Side side;
  TransferRequest send = request(TransferKind::send, {side.page_at(0)});
  send.tag = 7;
  (void)side.start(std::move(send), std::make_shared<Outcome>());
  const std::array<Descriptor, 1> buffers{{{0, Side::page}}};
  std::uint64_t last = 0;
  const auto post = [&] { return side.feed(frame_bytes(of_recv(FrameType::recv_post, ++last, 1), buffers)); };
  const auto come_and_go = [&](std::uint64_t times) {
    for (std::uint64_t i = 0; i < times; ++i) {
      ASSERT_FALSE(post());
      ASSERT_FALSE(side.feed(frame_bytes(of_recv(FrameType::recv_cancel, last, 0))));
    }
  };
  come_and_go(100);
  const auto held = test::blocks_held;
  come_and_go(10'000);
  EXPECT_LT(test::blocks_held - held, 10);
  ASSERT_FALSE(post());
  EXPECT_GT(side.take(std::size_t{1} << 20).size(), Side::page) << "the last recv gets it";
}

TEST(LaneProtocol, Line11_SenselessFramesBreakTheConnectionAndTouchNothing) {
  auto bad_magic = header(FrameType::write, 1, 0);
  bad_magic.magic = 0;
  auto huge_notification = header(FrameType::notify);
  huge_notification.notification_bytes = ~std::uint32_t{0};
  auto unknown = header(static_cast<FrameType>(77));
  const std::vector<Hostile> table = {
      {"magic", bad_magic, {}},
      {"unknown type", unknown, {}},
      {"type 0", header(static_cast<FrameType>(0)), {}},
      {"write without objects", header(FrameType::write, 0, 4096), {}},
      {"write of too many objects", header(FrameType::write, max_chunk_objects + 1, 0), {}},
      {"write of 2^64-1 bytes", header(FrameType::write, 1, ~std::uint64_t{0}), {}},
      {"write whose descriptors don't add up", header(FrameType::write, 1, 4096), {{0, 4095}}},
      {"write whose descriptors overflow", header(FrameType::write, 2, 0), {{0, ~std::uint64_t{0}}, {1, 1}}},
      {"read of too many bytes", header(FrameType::read, 1, max_chunk_bytes + 1), {}},
      {"recv of 2^32-1 objects", header(FrameType::recv_post, ~std::uint32_t{0}, 0), {}},
      {"notification too large", huge_notification, {}},
      {"acknowledgement of nothing", header(FrameType::write_ack), {}},
      {"acknowledgement of no send", header(FrameType::send_ack), {}},
      {"data that nobody asked for", header(FrameType::read_data, 0, 4096), {}, 4096},
      {"data for a recv that never was", header(FrameType::send_data, 1, 16), {{0, 16}}, 16},
      {"abort of a recv that never was", header(FrameType::send_abort), {}},
      {"cancel with payload", header(FrameType::recv_cancel, 0, 1), {}},
      {"probe with payload", header(FrameType::probe, 0, 1), {}},
      {"answer to a probe that never was", header(FrameType::probe_answer), {}},
  };
  for (const Hostile& hostile : table) {
    Side side;
    const auto before = side.memory;
    const std::vector<std::byte> payload(hostile.payload, std::byte{0xee});
    const auto ec = side.feed(frame_bytes(hostile.header, hostile.descriptors, payload));
    EXPECT_EQ(ec, errc::protocol_violation) << hostile.name;
    EXPECT_FALSE(side.protocol->violation().empty()) << hostile.name;
    EXPECT_TRUE(kvferry::testing::same_bytes(side.memory, before)) << hostile.name;
  }
}

TEST(LaneProtocol, Line11_ANotificationIsNotAcknowledgedBeforeItIsSent) {
  Side side;
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> pages;
  for (std::uint64_t i = 0; i < max_chunk_bytes / Side::page * 2; ++i) {
    objects.push_back(side.page_at(i));
    pages.push_back(i);
  }
  auto two_frames = request(TransferKind::write, objects, pages);
  two_frames.notification.resize(3);
  const auto outcome = std::make_shared<Outcome>();
  side.start(std::move(two_frames), outcome);
  side.start(request(TransferKind::write, {side.page_at(0)}, {0}), std::make_shared<Outcome>());
  while (!side.take(std::size_t{1} << 20).empty()) {
  }
  for (int frame = 0; frame < 2; ++frame) {
    ASSERT_FALSE(side.feed(frame_bytes(header(FrameType::write_ack))));
  }
  ASSERT_EQ(outcome->calls, 0) << "the notification is next";
  EXPECT_EQ(side.feed(frame_bytes(header(FrameType::write_ack))), errc::protocol_violation);
  EXPECT_EQ(outcome->calls, 0);
}

TEST(LaneProtocol, Line11_RequestsOutOfBoundsAreRefusedAndTouchNothing) {
  struct Case {
    const char* name;
    std::uint32_t region;
    std::uint64_t first_offset;
    Descriptor descriptor;
    errc expected;
  };
  const std::vector<Case> table = {
      {"no such region", 2, 0, {0, 16}, errc::unknown_region},
      {"region 2^32-1", ~std::uint32_t{0}, 0, {0, 16}, errc::unknown_region},
      {"region without access", 1, 0, {0, 16}, errc::access_denied},
      {"page behind the last", 0, 0, {Side::pages, 16}, errc::index_out_of_range},
      {"page 2^64-1", 0, 0, {~std::uint64_t{0}, 16}, errc::index_out_of_range},
      {"page whose address wraps to the first", 0, 0, {std::uint64_t{1} << 52, 16}, errc::index_out_of_range},
      {"more than a page", 0, 0, {0, Side::page + 1}, errc::object_too_large},
      {"over the page's end", 0, 1, {0, Side::page}, errc::object_too_large},
      {"offset 2^64-1", 0, ~std::uint64_t{0}, {0, 16}, errc::object_too_large},
  };
  for (const Case& hostile : table) {
    for (const auto type : {FrameType::write, FrameType::read}) {
      Side side;
      const auto before = side.memory;
      FrameHeader made = header(type, 1, hostile.descriptor.length);
      made.region = hostile.region;
      made.first_offset = hostile.first_offset;
      const std::vector<std::byte> payload(type == FrameType::write ? hostile.descriptor.length : 0, std::byte{0xee});
      ASSERT_FALSE(side.feed(frame_bytes(made, {&hostile.descriptor, 1}, payload))) << hostile.name;
      const auto answer = side.take(4096);
      ASSERT_EQ(answer.size(), sizeof(FrameHeader)) << hostile.name;
      FrameHeader answered;
      std::memcpy(&answered, answer.data(), sizeof(answered));
      EXPECT_EQ(answered.status, static_cast<std::uint32_t>(hostile.expected)) << hostile.name;
      EXPECT_TRUE(kvferry::testing::same_bytes(side.memory, before)) << hostile.name;
    }
  }
}

TEST(LaneProtocol, Line11_TheReceiverHoldsAPeerToARegionsAccessItself) {
  for (const auto access : {Access::none, Access::read, Access::write, Access::read_write}) {
    for (const auto type : {FrameType::write, FrameType::read}) {
      std::vector<std::byte> memory(Side::page, std::byte{1});
      Side side(std::vector<MemoryRegion>{{memory.data(), memory.size(), Side::page, access}});
      const bool may = type == FrameType::write ? access == Access::write || access == Access::read_write
                                                : access == Access::read || access == Access::read_write;
      const Descriptor descriptor{0, 16};
      const std::vector<std::byte> payload(type == FrameType::write ? 16 : 0, std::byte{0xee});
      ASSERT_FALSE(side.feed(frame_bytes(header(type, 1, 16), {&descriptor, 1}, payload)));
      const auto answer = side.take(4096);
      FrameHeader answered;
      ASSERT_GE(answer.size(), sizeof(answered));
      std::memcpy(&answered, answer.data(), sizeof(answered));
      EXPECT_EQ(answered.status, may ? 0U : static_cast<std::uint32_t>(errc::access_denied))
          << static_cast<int>(access) << ", frame of type " << static_cast<int>(type);
      EXPECT_EQ(memory[0], may && type == FrameType::write ? std::byte{0xee} : std::byte{1});
    }
  }
}

TEST(LaneProtocol, Line11_RequestsUpToTheirBoundsAreTaken) {
  struct Case {
    const char* name;
    std::uint64_t first_offset;
    Descriptor descriptor;
  };
  const std::vector<Case> table = {
      {"a whole page", 0, {0, Side::page}},
      {"the last page", 0, {1, Side::page}},
      {"up to the page's end", 100, {1, Side::page - 100}},
      {"nothing", 0, {0, 0}},
      {"nothing at the page's end", Side::page, {0, 0}},
  };
  for (const Case& bound : table) {
    for (const auto type : {FrameType::write, FrameType::read}) {
      Side side(2);
      FrameHeader made = header(type, 1, bound.descriptor.length);
      made.first_offset = bound.first_offset;
      const std::vector<std::byte> payload(type == FrameType::write ? bound.descriptor.length : 0, std::byte{0xee});
      ASSERT_FALSE(side.feed(frame_bytes(made, {&bound.descriptor, 1}, payload))) << bound.name;
      const auto answer = side.take(2 * Side::page);
      FrameHeader answered;
      ASSERT_GE(answer.size(), sizeof(answered)) << bound.name;
      std::memcpy(&answered, answer.data(), sizeof(answered));
      EXPECT_EQ(answered.status, 0U) << bound.name;
      const std::size_t offset = bound.descriptor.index * Side::page + bound.first_offset;
      for (std::size_t i = 0; i < side.memory.size(); ++i) {
        const bool written = type == FrameType::write && i >= offset && i - offset < bound.descriptor.length;
        ASSERT_EQ(side.memory[i], written ? std::byte{0xee} : std::byte{0}) << bound.name << ", byte " << i;
      }
    }
  }
}

TEST(LaneProtocol, Line11_WindowsAreTheSameOnBothSides) {
  // As much as a peer may leave unanswered is taken, and a frame more is a violation.
  const std::vector<std::byte> payload(16, std::byte{0xee});
  const Descriptor descriptor{0, 16};
  for (const auto type : {FrameType::write, FrameType::read}) {
    const std::size_t window = type == FrameType::write ? max_unacknowledged : max_outstanding_reads;
    const auto frame = frame_bytes(header(type, 1, 16), {&descriptor, 1},
                                   type == FrameType::write ? payload : std::vector<std::byte>());
    Side side(1);
    for (std::size_t i = 0; i < window; ++i) {
      ASSERT_FALSE(side.feed(frame)) << i << ": " << side.protocol->violation();
      if (type == FrameType::read) {
        side.protocol->fill(1 << 20);  // an answer that waits to be sent is none yet
      }
    }
    EXPECT_EQ(side.feed(frame), errc::protocol_violation);
  }
  // And this side sends no more than that.
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    const std::size_t window = kind == TransferKind::write ? max_unacknowledged : max_outstanding_reads;
    const std::size_t frame =
        sizeof(FrameHeader) + sizeof(Descriptor) + (kind == TransferKind::write ? 16 + sizeof(FrameTrailer) : 0);
    Side side(1);
    for (std::size_t i = 0; i < window + 10; ++i) {
      side.start(request(kind, {side.page_at(0, 16)}, {0}), std::make_shared<Outcome>());
    }
    std::size_t bytes = 0;
    for (auto sent = side.take(1 << 20); !sent.empty(); sent = side.take(1 << 20)) {
      bytes += sent.size();
    }
    EXPECT_EQ(bytes, window * frame);
  }
}

TEST(LaneProtocol, Line11_AStatusThatThereIsNotIsNoSuccess) {
  Side side;
  const auto outcome = std::make_shared<Outcome>();
  side.start(request(TransferKind::write, {side.page_at(0)}, {0}), outcome);
  while (!side.take(1 << 20).empty()) {
  }
  auto ack = header(FrameType::write_ack);
  ack.status = 7777;
  ASSERT_FALSE(side.feed(frame_bytes(ack)));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->count, 0U);
  EXPECT_EQ(outcome->ec, errc::protocol_violation);
  EXPECT_EQ(outcome->statuses[0], errc::protocol_violation);
}

TEST(LaneProtocol, Line11_SendDataThatDoesNotFitItsRecvBreaksTheConnection) {
  const auto attempt = [](const FrameHeader& made, std::vector<Descriptor> descriptors) {
    Side side;
    const auto outcome = std::make_shared<Outcome>();
    side.start(request(TransferKind::recv, {side.page_at(0, 64), side.page_at(1, 64)}), outcome);
    (void)side.take(4096);
    const auto before = side.memory;
    const std::vector<std::byte> payload(made.payload_bytes, std::byte{0xee});
    const auto ec = side.feed(frame_bytes(made, descriptors, payload));
    EXPECT_TRUE(kvferry::testing::same_bytes(side.memory, before));
    return ec;
  };
  EXPECT_EQ(attempt(header(FrameType::send_data, 1, 65), {{0, 65}}), errc::protocol_violation);
  EXPECT_EQ(attempt(header(FrameType::send_data, 1, 64), {{1, 64}}), errc::protocol_violation);
  EXPECT_EQ(attempt(header(FrameType::send_data, 3, 3), {{0, 1}, {1, 1}, {2, 1}}), errc::protocol_violation);
  EXPECT_EQ(attempt(header(FrameType::send_data, 2, 65), {{0 | Descriptor::continues, 64}, {0, 1}}),
            errc::protocol_violation);
  EXPECT_EQ(attempt(header(FrameType::send_data, 1, 64), {{0 | Descriptor::refused, 64}}), errc::protocol_violation);
  EXPECT_EQ(attempt(header(FrameType::send_data, 2, 64), {{0 | Descriptor::continues, 32}, {0, 32}}),
            errc::protocol_violation);
}

TEST(LaneProtocol, Line11_AnAcknowledgementBeforeTheBytesAreSentBreaksTheConnection) {
  Side a;
  const auto outcome = std::make_shared<Outcome>();
  a.start(request(TransferKind::write, {a.page_at(0)}, {0}), outcome);
  (void)a.take(100);
  EXPECT_EQ(a.feed(frame_bytes(header(FrameType::write_ack))), errc::protocol_violation);
  EXPECT_EQ(outcome->calls, 0);
}

TEST(LaneProtocol, Line11_PostedRecvsAreBounded) {
  Side side;
  std::size_t posted = 0;
  std::vector<Descriptor> descriptors(max_chunk_objects, Descriptor{0, 16});
  bool refused = false;
  while (!refused && posted < 2 * kit::max_posted_cost) {
    FrameHeader made = header(FrameType::recv_post, static_cast<std::uint32_t>(descriptors.size()));
    made.operation = posted + 1;
    ASSERT_FALSE(side.feed(frame_bytes(made, descriptors)));
    posted += descriptors.size();
    refused = !side.take(4096).empty();
  }
  EXPECT_TRUE(refused);
  EXPECT_LE(posted, kit::max_posted_cost + descriptors.size());
}

TEST(LaneProtocol, Line11_RefusalsOfPostedRecvsAreBoundedToo) {
  Side side;
  const std::vector<Descriptor> many(kit::max_paired_objects, Descriptor{0, 16});
  std::uint64_t recv = 0;
  const auto post = [&](std::size_t buffers) {
    FrameHeader made = header(FrameType::recv_post, static_cast<std::uint32_t>(buffers));
    made.operation = ++recv;
    return side.feed(frame_bytes(made, std::span(many).first(buffers)));
  };
  ASSERT_FALSE(post(kit::max_paired_objects));
  ASSERT_FALSE(post(kit::max_paired_objects - 48));  // with what each recv adds, that is all there is room for
  EXPECT_TRUE(side.take(4096).empty()) << "what there is room for is not refused";
  for (std::size_t i = 0; i < max_unacknowledged; ++i) {
    ASSERT_FALSE(post(1));
  }
  EXPECT_EQ(post(1), errc::protocol_violation);
}

TEST(LaneProtocol, Line11_ARecvThatIsComingInTakesUpMemoryOfItsPeers) {
  const std::vector<Descriptor> many(kit::max_paired_objects, Descriptor{0, 16});
  const auto host = [] {
    Side side;
    const std::vector<Descriptor> half(kit::max_paired_objects / 2);
    EXPECT_FALSE(side.feed(frame_bytes(header(FrameType::recv_post, kit::max_paired_objects), half)));
    EXPECT_GE(side.host->memory_taken, half.size() * sizeof(Descriptor) - (std::size_t{64} << 10));
    EXPECT_LE(side.host->memory_taken, 2 * half.size() * sizeof(Descriptor));
    return side.host;
  }();
  EXPECT_EQ(host->memory_taken, 0U) << "the connection is gone";

  Side side;
  side.host->memory_limit = std::size_t{1} << 20;
  auto made = header(FrameType::recv_post, kit::max_paired_objects);
  for (const std::size_t step : {std::size_t{100'000}, std::size_t{1} << 20}) {
    ASSERT_FALSE(side.feed(frame_bytes(made, many), step));
    EXPECT_LE(side.host->most_memory_taken, side.host->memory_limit);
    EXPECT_EQ(side.host->memory_taken, 0U);
    const auto answer = side.take(4096);
    ASSERT_EQ(answer.size(), sizeof(FrameHeader));
    FrameHeader abort;
    std::memcpy(&abort, answer.data(), sizeof(abort));
    EXPECT_EQ(abort.type, FrameType::send_abort);
    EXPECT_EQ(abort.operation, made.operation);
    EXPECT_EQ(static_cast<errc>(abort.status), errc::resource_limit);
    ++made.operation;
  }
  // There is room for a smaller one, until a send has met it.
  made.count = 1;
  ASSERT_FALSE(side.feed(frame_bytes(made, std::span(many).first(1))));
  EXPECT_TRUE(side.take(4096).empty());
  EXPECT_GT(side.host->memory_taken, 0U);
  const auto outcome = std::make_shared<Outcome>();
  side.start(request(TransferKind::send, {side.page_at(0, 16)}), outcome);
  EXPECT_EQ(side.host->memory_taken, 0U);
}

TEST(LaneProtocol, Line11_ARecvIsPostedOnceAndNotUnderZero) {
  const Descriptor buffer{0, 16};
  for (const std::uint64_t second : {0U, 1U, 7U}) {
    Side side;
    FrameHeader made = header(FrameType::recv_post, 1);
    made.operation = 7;
    ASSERT_FALSE(side.feed(frame_bytes(made, {&buffer, 1})));
    made.operation = second;
    EXPECT_EQ(side.feed(frame_bytes(made, {&buffer, 1})), errc::protocol_violation) << second;
  }
  // A send that met a recv, then its end, then a cancellation of that recv.
  Side side;
  FrameHeader made = header(FrameType::recv_post, 1);
  made.operation = 0;
  EXPECT_EQ(side.feed(frame_bytes(made, {&buffer, 1})), errc::protocol_violation);
}

TEST(LaneProtocol, Line11_ProbesWhoseAnswersAreNotTakenBreakTheConnection) {
  Side side;
  const auto probe = frame_bytes(header(FrameType::probe));
  for (std::size_t i = 0; i < max_outstanding_probes; ++i) {
    EXPECT_FALSE(side.feed(probe));
  }
  EXPECT_EQ(side.feed(probe), errc::protocol_violation) << side.protocol->violation();
}

}  // namespace
}  // namespace kvferry::tcp::testing
