// SPDX-License-Identifier: Apache-2.0
// Work requests and messages of a rail, with both of its ends in memory: requests are carried out by this test instead of
// an adapter.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/rdma_error.hpp>
#include <kvferry/testing/patterns.hpp>

#include "common/same_bytes.hpp"
#include "fuzz/message_types.hpp"
#include "rdma/rail_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolTest : public ::testing::Test {
 protected:
  static constexpr std::size_t buffers = 8;

  RailProtocolTest() {
    a.join(b);
    b.join(a);
    kvferry::testing::fill(MutableBuffer(a.memory), 3);
    kvferry::testing::fill(MutableBuffer(b.memory), 4);
  }

  /// Does what there is to do. @return whether there was anything.
  bool step(Side& from, Side& to) {
    if (!from.protocol->fill(*list_)) {
      return false;
    }
    for (const ibv_send_wr* request = list_->finish(); request != nullptr; request = request->next) {
      carry_out(*request, to);
    }
    from.protocol->completed();
    return true;
  }

  bool receive(Side& side) {
    if (side.arrived.empty()) {
      return false;
    }
    const auto message = std::move(side.arrived.front());
    side.arrived.pop_front();
    EXPECT_EQ(side.protocol->received(message), std::error_code()) << side.protocol->violation();
    return true;
  }

  /// Lets both sides work until nothing is left to do, each `lazy` times as often sending as receiving.
  void run(int lazy = 1) {
    bool busy = true;
    while (busy) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        for (int i = 0; i < lazy; ++i) {
          busy = step(*from, *to) || busy;
        }
        busy = receive(*to) || busy;
      }
    }
  }

  static std::vector<MutableBuffer> cut(Side& side, std::size_t count, std::size_t size) {
    std::vector<MutableBuffer> objects;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(side.at(i * size, size));
    }
    return objects;
  }

  Side a{512, buffers};
  Side b{512, buffers};
  std::unique_ptr<WorkList> list_ = std::make_unique<WorkList>();
};

TEST_F(RailProtocolTest, ManySmallObjectsOverFewReceiveBuffers) {
  for (const int lazy : {1, 5}) {
    SCOPED_TRACE(lazy);
    const auto sent = std::make_shared<Outcome>();
    const auto received = std::make_shared<Outcome>();
    a.start(paired(TransferKind::send, cut(a, 20'000, 100), 1), sent);
    b.start(paired(TransferKind::recv, cut(b, 20'000, 100), 1), received);
    run(lazy);
    EXPECT_EQ(sent->count, 20'000U) << sent->ec.message();
    EXPECT_EQ(received->count, 20'000U);
    EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, 2'000'000), b.at(0, 2'000'000)));
    EXPECT_LE(a.most_arrived, buffers) << "a message that would have found no receive buffer";
    EXPECT_LE(b.most_arrived, buffers);
    std::ranges::fill(b.memory, std::byte{0});
  }
}

TEST_F(RailProtocolTest, BothSendAtOnceAndNeitherRunsOutOfCredits) {
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (std::uint64_t tag = 0; tag < 200; ++tag) {
    for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
      const std::size_t half = from == &a ? 0 : a.memory.size() / 2;
      outcomes.push_back(std::make_shared<Outcome>());
      from->start(paired(TransferKind::send, {from->at(half + 3000 * tag, 3000)}, tag), outcomes.back());
      outcomes.push_back(std::make_shared<Outcome>());
      to->start(paired(TransferKind::recv, {to->at(half + 3000 * tag, 3000)}, tag), outcomes.back());
    }
  }
  run(3);
  for (const auto& outcome : outcomes) {
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->count, 1U) << outcome->ec.message();
  }
  EXPECT_LE(std::max(a.most_arrived, b.most_arrived), buffers);
}

TEST_F(RailProtocolTest, ARecvWithDirectBuffersEndsWhenTheSenderHasAnswered) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  const auto recv = b.start(paired(TransferKind::recv, {b.at(0, 100'000)}, 1), received);
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));  // the recv is known there
  a.start(paired(TransferKind::send, {a.at(0, 100'000)}, 1), sent);
  ASSERT_TRUE(step(a, b));  // a queue's depth of it is written
  recv->request_stop(errc::cancelled);
  EXPECT_TRUE(b.protocol->draining_since().has_value());
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));  // that it was cancelled
  run();
  EXPECT_FALSE(b.protocol->draining_since().has_value());
  EXPECT_EQ(received->calls, 1);
  EXPECT_EQ(sent->calls, 0) << "waits for the next recv";
  const auto again = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, {b.at(200'000, 100'000)}, 1), again);
  run();
  EXPECT_EQ(sent->count, 1U);
  EXPECT_EQ(again->count, 1U);
  EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, 100'000), b.at(200'000, 100'000)));
}

TEST_F(RailProtocolTest, ALongNotificationComesWhole) {
  const auto written = std::make_shared<Outcome>();
  TransferRequest request;
  request.kind = TransferKind::write;
  request.peer_id = "peer";
  request.objects = {a.at(0, page)};
  request.remote_indexes = {7};
  request.notification.assign(a.memory.begin(), a.memory.begin() + max_notification_bytes);
  a.start(request, written);
  run();
  EXPECT_EQ(written->count, 1U);
  ASSERT_EQ(b.host->notifications.size(), 1U);
  EXPECT_EQ(b.host->notifications[0], request.notification);
  EXPECT_TRUE(kvferry::testing::same_bytes(a.at(0, page), b.at(7 * page, page)));
}

TEST_F(RailProtocolTest, RangesAndStridesGoBothWays) {
  for (const auto kind : {TransferKind::write, TransferKind::read}) {
    for (std::size_t i = 0; i < a.memory.size(); ++i) {
      a.memory[i] = static_cast<std::byte>(i * 7 / 3);
      b.memory[i] = static_cast<std::byte>(i * 11 / 5 + 1);
    }
    TransferRequest request = one_sided(kind, {a.at(100, 99 * 300 + 200), a.at(60'000, 0), a.at(70'000, 9000)}, {});
    request.local_strides = {{200, 300}, {}, {}};
    request.remote_ranges = {RemoteRange::strided(0, 7, 50, 64, 400), RemoteRange::strided(0, 5, 10, 10, 0),
                             RemoteRange::contiguous(0, 100'001, 9000)};
    auto expected_a = a.memory;
    auto expected_b = b.memory;
    const auto move = [&](std::size_t here, std::size_t there) {
      kind == TransferKind::write ? expected_b[there] = a.memory[here] : expected_a[here] = b.memory[there];
    };
    for (std::size_t i = 0; i < 20'000; ++i) {
      move(100 + i / 200 * 300 + i % 200, 7 + i / 50 * 64 + i % 50);
    }
    for (std::size_t i = 0; i < 9000; ++i) {
      move(70'000 + i, 100'001 + i);
    }
    const auto outcome = std::make_shared<Outcome>();
    a.start(request, outcome);
    run();
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->count, 3U) << outcome->ec.message();
    EXPECT_TRUE(kvferry::testing::same_bytes(a.memory, expected_a));
    EXPECT_TRUE(kvferry::testing::same_bytes(b.memory, expected_b));
  }
}

/// Brings a write's bytes and notification to b, and a's list to its completion only if `completes`.
void hand_over(Side& a, Side& b, WorkList& list, const std::shared_ptr<Outcome>& written, bool completes) {
  a.start(one_sided(TransferKind::write, {a.at(0, page)}, {7}, {std::byte{1}, std::byte{2}}), written);
  ASSERT_TRUE(a.protocol->fill(list));
  for (const ibv_send_wr* request = list.finish(); request != nullptr; request = request->next) {
    carry_out(*request, b);
  }
  if (completes) {
    a.protocol->completed();
  }
  ASSERT_EQ(b.arrived.size(), 1U);
  EXPECT_FALSE(b.protocol->received(b.arrived.front()));
  b.arrived.pop_front();
  ASSERT_EQ(b.host->notifications.size(), 1U);
}

TEST_F(RailProtocolTest, WhoLeavesFirstAnswersWhatWasHandedOver) {
  const auto written = std::make_shared<Outcome>();
  hand_over(a, b, *list_, written, true);
  b.protocol->leave();
  EXPECT_FALSE(b.protocol->settled());
  ASSERT_TRUE(b.protocol->fill_answers(*list_));
  carry_out(*list_->finish(), a);
  EXPECT_FALSE(b.protocol->settled()) << "not before its adapter says that the answer is there";
  b.protocol->completed();
  EXPECT_TRUE(b.protocol->settled());
  ASSERT_TRUE(receive(a));
  EXPECT_EQ(written->calls, 1);
  EXPECT_EQ(written->count, 1U) << written->ec.message();
}

TEST_F(RailProtocolTest, WhoLeavesTakesNothingNew) {
  b.protocol->leave();
  const auto written = std::make_shared<Outcome>();
  a.start(one_sided(TransferKind::write, {a.at(0, page)}, {7}, {std::byte{1}}), written);
  ASSERT_TRUE(step(a, b));
  ASSERT_TRUE(receive(b));
  EXPECT_TRUE(b.host->notifications.empty());
  EXPECT_TRUE(b.protocol->settled()) << "nothing is answered that wasn't handed over";
  EXPECT_EQ(written->calls, 0);
  a.protocol->fail(errc::peer_closed, "goodbye");
  EXPECT_EQ(written->ec, errc::peer_closed);
}

TEST_F(RailProtocolTest, AnAnsweredWriteHasLandedThoughItsCompletionIsLost) {
  const auto written = std::make_shared<Outcome>();
  hand_over(a, b, *list_, written, false);
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));
  EXPECT_EQ(written->calls, 0) << "its buffers are with the adapter";
  a.protocol->fail(errc::peer_closed, "goodbye");
  EXPECT_EQ(written->calls, 1);
  EXPECT_EQ(written->count, 1U);
  EXPECT_EQ(written->ec, std::error_code());
}

TEST_F(RailProtocolTest, AnAnsweredSendHasArrivedThoughItsCompletionIsLost) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, {b.at(0, 2 * page)}, 1), received);
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));
  a.start(paired(TransferKind::send, {a.at(0, 2 * page)}, 1), sent);
  ASSERT_TRUE(a.protocol->fill(*list_));
  for (const ibv_send_wr* request = list_->finish(); request != nullptr; request = request->next) {
    carry_out(*request, b);
  }
  while (receive(b)) {
  }
  EXPECT_EQ(received->count, 1U);
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));
  EXPECT_EQ(sent->calls, 0);
  a.protocol->fail(errc::peer_closed, "goodbye");
  EXPECT_EQ(sent->ec, std::error_code());
  EXPECT_EQ(sent->count, 1U);
}

TEST_F(RailProtocolTest, OthersMayTryAgainWhenOneBreaksTheQueuePair) {
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (std::uint64_t i = 0; i < 3; ++i) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "peer";
    request.objects = {a.at(i * page, page)};
    request.remote_indexes = {2 * i};
    outcomes.push_back(std::make_shared<Outcome>());
    a.start(request, outcomes.back());
  }
  ASSERT_TRUE(a.protocol->fill(*list_));
  const std::uint64_t culprit = (*list_)[1].wr_id;
  a.protocol->fail(wc_status::local_protection_error, "the test says so", culprit);
  EXPECT_EQ(outcomes[0]->ec, errc::connection_lost);
  EXPECT_EQ(outcomes[1]->ec, wc_status::local_protection_error);
  EXPECT_NE(outcomes[1]->ec, condition::retryable);
  EXPECT_EQ(outcomes[2]->ec, condition::retryable);
}

TEST_F(RailProtocolTest, ASendWhoseRecvHasVanishedMeetsAFailedPeer) {
  const auto sent = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, {b.at(0, 10'000)}, 1), std::make_shared<Outcome>());
  ASSERT_TRUE(step(b, a));
  ASSERT_TRUE(receive(a));
  a.start(paired(TransferKind::send, {a.at(0, 10'000)}, 1), sent);
  ASSERT_TRUE(a.protocol->fill(*list_));
  a.protocol->fail(wc_status::remote_access_error, "the peer's process died", (*list_)[0].wr_id);
  EXPECT_EQ(sent->ec, condition::peer_failed);
  EXPECT_NE(sent->ec, condition::retryable);
}

/// A message as a peer might send it.
std::vector<std::byte> message(MessageHeader header, std::size_t body = 0) {
  header.body_bytes = static_cast<std::uint32_t>(body);
  std::vector<std::byte> bytes(sizeof(header) + body);
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

TEST_F(RailProtocolTest, Line11_SenselessMessagesAreViolations) {
  const auto header = [](MessageType type, auto change) {
    MessageHeader result;
    result.type = type;
    change(result);
    return result;
  };
  const std::vector<std::vector<std::byte>> all{
      {},
      std::vector<std::byte>(20),
      message(header(MessageType::credit, [](auto& h) { h.magic = 1; })),
      message(header(MessageType::credit, [](auto& h) { h.credits = 1; })),
      message(header(static_cast<MessageType>(99), [](auto&) {})),
      message(header(MessageType::hello, [](auto&) {})),
      message(header(MessageType::notify, [](auto& h) { h.total = 100'000; }), 10),
      message(header(MessageType::notify, [](auto& h) { h.total = 5; }), 10),
      message(header(MessageType::notify, [](auto& h) { h.total = 20, h.first = 10, h.flags = 1; }), 10),
      message(header(MessageType::notify_ack, [](auto& h) { h.operation = 5; })),
      message(header(MessageType::recv_post, [](auto& h) { h.operation = 1, h.count = 1, h.total = 1, h.flags = 1; }),
              23),
      message(header(MessageType::recv_post, [](auto& h) { h.operation = 1, h.count = 1, h.total = 1; }), 24),
      message(header(MessageType::recv_post, [](auto& h) { h.operation = 1, h.count = 1, h.total = 1U << 31; }), 24),
      message(header(MessageType::recv_post, [](auto& h) { h.operation = 0, h.count = 1, h.total = 1, h.flags = 1; }),
              24),
      message(header(MessageType::recv_post, [](auto& h) { h.operation = 1, h.count = 1, h.total = 9, h.first = 3; }),
              24),
      message(header(MessageType::send_data, [](auto& h) { h.operation = 77, h.flags = 1; })),
      message(header(MessageType::send_ack, [](auto& h) { h.operation = 77; })),
      message(header(MessageType::send_abort, [](auto& h) { h.operation = 77; })),
      message(header(MessageType::recv_cancel_ack, [](auto& h) { h.operation = 77; })),
  };
  for (std::size_t i = 0; i < all.size(); ++i) {
    SCOPED_TRACE(i);
    Side side(4, buffers);
    side.join(b);
    EXPECT_EQ(side.protocol->received(all[i]), errc::protocol_violation);
    EXPECT_FALSE(side.protocol->violation().empty());
  }
}

TEST_F(RailProtocolTest, Line11_ARecvThatIsComingInTakesUpMemoryOfItsPeers) {
  const std::size_t in_a_message = (small_message - sizeof(MessageHeader)) / sizeof(PostedBuffer);
  const auto outcome = std::make_shared<Outcome>();
  a.start(paired(TransferKind::recv, cut(a, 3 * in_a_message, 8), 1), outcome);
  while (b.host->memory_taken == 0 && (step(a, b) || !b.arrived.empty())) {
    receive(b);
  }
  EXPECT_GT(b.host->memory_taken, 0U);
  EXPECT_EQ(outcome->calls, 0);
  b.host->memory_limit = 2 * in_a_message * sizeof(PostedBuffer);
  run();
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, errc::resource_limit);
  EXPECT_EQ(b.host->memory_taken, 0U);
}

TEST_F(RailProtocolTest, Line11_SentObjectsAreHeldToTheirBuffers) {
  const std::vector<std::uint64_t> entries{
      5000,                                      // more than the buffer holds
      10,                                        // more than the message has
      SentObject::direct | 5000,                 // more than the buffer holds
      SentObject::direct | 100,                  // but this buffer wasn't offered
      SentObject::direct | SentObject::refused,  // both
      SentObject::length_mask,
  };
  for (const std::uint64_t entry : entries) {
    SCOPED_TRACE(entry);
    Side side(4, buffers);
    side.join(b);
    const auto outcome = std::make_shared<Outcome>();
    side.start(paired(TransferKind::recv, {side.at(0, 400)}, 1), outcome);
    MessageHeader header;
    header.type = MessageType::send_data;
    header.operation = 1;
    header.count = 1;
    header.flags = MessageHeader::last;
    auto bytes = message(header, sizeof(entry));
    std::memcpy(bytes.data() + sizeof(header), &entry, sizeof(entry));
    EXPECT_EQ(side.protocol->received(bytes), errc::protocol_violation);
    EXPECT_EQ(outcome->calls, 0);
  }
}

TEST_F(RailProtocolTest, Line11_AnyBytesAreEitherUnderstoodOrViolations) {
  std::mt19937 engine(11);
  const auto random = [&] { return static_cast<std::uint32_t>(engine()); };
  for (int round = 0; round < 20'000; ++round) {
    Side side(1, buffers);
    side.join(b);
    const auto outcome = std::make_shared<Outcome>();
    side.start(paired(TransferKind::recv, {side.at(0, 2000)}, 1), outcome);
    for (int i = 0; i < 3; ++i) {
      MessageHeader header;
      header.type = message_types[random() % message_types.size()];
      header.flags = static_cast<std::uint8_t>(random() % 4);
      header.count = random() % 4;
      header.operation = random() % 4;
      header.tag = random() % 3;
      header.first = random() % 3;
      header.total = random() % 5;
      header.status = random() % 30;
      auto bytes = message(header, 8 * (random() % 10));
      std::ranges::generate(bytes.begin() + sizeof(header), bytes.end(),
                            [&] { return static_cast<std::byte>(random() % 5); });
      if (side.protocol->received(bytes)) {
        break;
      }
      while (side.protocol->fill(*list_)) {
        side.protocol->completed();
      }
    }
  }
}

TEST(RailProtocolProbes, HaveNoPieceOfAListThatWasPostedBefore) {
  Side a(4, 4);
  Side b(4, 4);
  a.join(b);
  WorkList list;
  ASSERT_TRUE(a.protocol->fill_message(list, MessageType::hello, 1, 0));
  ASSERT_EQ(list[0].num_sge, 1);
  ASSERT_TRUE(a.protocol->fill_probe(list));
  EXPECT_EQ(list[0].num_sge, 0);
  EXPECT_EQ(list[0].sg_list, nullptr) << "irdma sends the first piece of a list that there is";
}

TEST(RailProtocolProbes, AreAnsweredByTheirOwnCompletionAndNotByThatOfWhatWasPostedBefore) {
  Side a(4, 4);
  Side b(4, 4);
  a.join(b);
  WorkList list;
  std::string answered;
  ASSERT_TRUE(a.protocol->fill_probe(list));  // a keepalive: nobody waits for it
  ASSERT_TRUE(a.protocol->fill_probe(list, [&] { answered += "first"; }));
  EXPECT_EQ(list.size(), 1U);
  EXPECT_EQ(list[0].num_sge, 0);
  a.protocol->completed();
  EXPECT_EQ(answered, "");
  a.protocol->completed();
  EXPECT_EQ(answered, "first");
  ASSERT_TRUE(a.protocol->fill_probe(list, [&] { answered += ", second"; }));
  a.protocol->fail(errc::connection_lost, "the test says so", 0);
  EXPECT_EQ(answered, "first");
}

}  // namespace
}  // namespace kvferry::rdma::testing
