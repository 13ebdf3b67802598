// SPDX-License-Identifier: Apache-2.0
#include "tcp/lane_protocol.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "protocol_harness.hpp"

namespace kvferry::tcp::testing {
namespace {

void fill(std::span<std::byte> memory, unsigned seed) {
  std::mt19937 random(seed);
  for (std::byte& byte : memory) {
    byte = static_cast<std::byte>(random());
  }
}

TransferRequest request(TransferKind kind, std::vector<MutableBuffer> objects, std::vector<std::uint64_t> indexes = {}) {
  TransferRequest made;
  made.kind = kind;
  made.peer_id = "peer";
  made.objects = std::move(objects);
  made.remote_indexes = std::move(indexes);
  return made;
}

std::vector<std::uint64_t> shuffled(std::size_t count) {
  std::vector<std::uint64_t> indexes(count);
  for (std::size_t i = 0; i < count; ++i) {
    indexes[i] = i;
  }
  std::ranges::shuffle(indexes, std::mt19937(count));
  return indexes;
}

/// Every step size makes frames meet the boundaries of reads elsewhere.
class LaneProtocolSteps : public ::testing::TestWithParam<std::size_t> {};
INSTANTIATE_TEST_SUITE_P(Steps, LaneProtocolSteps, ::testing::Values(1, 7, 63, 64, 65, 511, 512, 513, 4096, 262144));

TEST_P(LaneProtocolSteps, WriteReadSendRecvMoveEveryByteAndNoOther) {
  const std::size_t count = GetParam() < 64 ? 3 : 600;
  const auto indexes = shuffled(Side::pages);
  for (const auto kind : {TransferKind::write, TransferKind::read, TransferKind::send}) {
    Side a;
    Side b;
    fill(a.memory, 1);
    fill(b.memory, 2);
    const auto before_a = a.memory;
    const auto before_b = b.memory;
    std::vector<MutableBuffer> local;
    std::vector<MutableBuffer> remote;
    std::vector<std::uint64_t> remote_indexes;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size = i % 3 == 0 ? Side::page : i % 5 * 100;
      local.push_back(a.page_at(indexes[i], size));
      remote_indexes.push_back(indexes[Side::pages - 1 - i]);
      remote.push_back(b.page_at(remote_indexes.back(), size));
    }
    const auto outcome = std::make_shared<Outcome>();
    const auto peer_outcome = std::make_shared<Outcome>();
    if (kind == TransferKind::send) {
      b.start(request(TransferKind::recv, remote), peer_outcome);
      a.start(request(kind, local), outcome);
    } else {
      a.start(request(kind, local, remote_indexes), outcome);
    }
    ASSERT_FALSE(settle(a, b, GetParam()));

    EXPECT_EQ(outcome->calls, 1);
    EXPECT_FALSE(outcome->ec) << outcome->diagnostic;
    EXPECT_EQ(outcome->count, count);
    auto expected_a = before_a;
    auto expected_b = before_b;
    for (std::size_t i = 0; i < count; ++i) {
      const auto a_offset = static_cast<std::size_t>(local[i].data() - a.memory.data());
      const auto b_offset = static_cast<std::size_t>(remote[i].data() - b.memory.data());
      if (kind == TransferKind::read) {
        std::memcpy(expected_a.data() + a_offset, before_b.data() + b_offset, local[i].size());
      } else {
        std::memcpy(expected_b.data() + b_offset, before_a.data() + a_offset, local[i].size());
      }
    }
    EXPECT_EQ(a.memory, expected_a);
    EXPECT_EQ(b.memory, expected_b);
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
  EXPECT_EQ(a.memory, quiet);

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
  operation->request_stop(errc::cancelled);
  a.protocol->stop(*operation);
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

/// What a hostile peer may send, and what becomes of it.
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
  };
  for (const Hostile& hostile : table) {
    Side side;
    const auto before = side.memory;
    const std::vector<std::byte> payload(hostile.payload, std::byte{0xee});
    const auto ec = side.feed(frame_bytes(hostile.header, hostile.descriptors, payload));
    EXPECT_EQ(ec, errc::protocol_violation) << hostile.name;
    EXPECT_FALSE(side.protocol->violation().empty()) << hostile.name;
    EXPECT_EQ(side.memory, before) << hostile.name;
  }
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
      EXPECT_EQ(side.memory, before) << hostile.name;
    }
  }
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
    EXPECT_EQ(side.memory, before);
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
  ASSERT_FALSE(post(kit::max_paired_objects - 16));  // with what each recv adds, that is all there is room for
  std::error_code ec;
  for (std::size_t i = 0; i < 2 * max_unacknowledged && !ec; ++i) {
    ec = post(1);
  }
  EXPECT_EQ(ec, errc::protocol_violation);
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
  operation->request_stop(errc::cancelled);
  a.protocol->stop(*operation);
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

}  // namespace
}  // namespace kvferry::tcp::testing
