// SPDX-License-Identifier: Apache-2.0
// Notifications alone, with reads and with keys, on a rail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolNotify : public TwoSides {
 protected:
  RailProtocolNotify() : TwoSides(64) { std::ranges::fill(b.memory, std::byte{7}); }

  std::shared_ptr<kit::Operation> read(const std::shared_ptr<Outcome>& outcome, std::uint64_t key = 0) {
    auto request = one_sided(TransferKind::read, {a.at(0, page), a.at(page, page)}, {7, 9}, {std::byte{1}});
    request.notification_key = key;
    return a.start(std::move(request), outcome);
  }

  /// Until neither side has anything to do.
  void exchange() {
    bool busy = true;
    while (busy) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        receive_all(*to);
        while (post(*from, *to)) {
          from->protocol->completed();
          receive_all(*to);
          busy = true;
        }
      }
    }
  }
};

TEST_F(RailProtocolNotify, OneAloneIsAMessageAndNothingElse) {
  const auto outcome = std::make_shared<Outcome>();
  auto request = one_sided(TransferKind::write, {}, {}, {std::byte{1}, std::byte{2}});
  request.notification_key = 77;
  a.start(std::move(request), outcome);
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  EXPECT_EQ(outcome->calls, 0) << "not before the peer has it";
  receive_all(b);
  EXPECT_EQ(b.host->notifications, std::vector(1, (std::vector<std::byte>{std::byte{1}, std::byte{2}})));
  EXPECT_EQ(b.host->notification_keys, std::vector<std::uint64_t>{77});
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec);
}

TEST_F(RailProtocolNotify, AReadsIsSentWhenItsBytesAreHere) {
  const auto outcome = std::make_shared<Outcome>();
  read(outcome, 5);
  ASSERT_TRUE(post(a, b));
  EXPECT_TRUE(b.arrived.empty()) << "the adapter has not said that the bytes are here";
  EXPECT_FALSE(post(a, b));
  a.protocol->completed();
  EXPECT_EQ(outcome->calls, 0);
  ASSERT_TRUE(post(a, b));
  EXPECT_TRUE(std::ranges::equal(a.at(0, page), b.at(0, page)));
  receive_all(b);
  ASSERT_EQ(b.host->notifications.size(), 1U);
  EXPECT_EQ(b.host->notification_keys.back(), 5U);
  a.protocol->completed();
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec);
  EXPECT_EQ(outcome->count, 2U);
}

TEST_F(RailProtocolNotify, AReadThatFailsGivesNone) {
  const auto outcome = std::make_shared<Outcome>();
  read(outcome);
  ASSERT_TRUE(post(a, b));
  a.protocol->fail(errc::connection_lost, "the queue pair broke");
  EXPECT_EQ(outcome->ec, errc::connection_lost);
  EXPECT_EQ(outcome->count, 0U);
  EXPECT_TRUE(b.arrived.empty());
}

TEST_F(RailProtocolNotify, AReadThatIsStoppedBeforeItsNotificationGoesGivesNone) {
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = read(outcome);
  ASSERT_TRUE(post(a, b));
  operation->request_stop(errc::cancelled);
  a.protocol->completed();
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  EXPECT_EQ(outcome->count, 2U) << "its bytes have come all the same";
  EXPECT_FALSE(post(a, b));
}

TEST_F(RailProtocolNotify, AReadThatIsStoppedWaitsForTheAnswerToItsNotification) {
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = read(outcome);
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(outcome->calls, 0) << "it is handed out, or will be";
  receive_all(b);
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec) << outcome->ec.message();
  EXPECT_EQ(outcome->count, 2U);
}

TEST_F(RailProtocolNotify, OneThatHasBegunIsSentWholeThoughItsWriteIsStopped) {
  const auto outcome = std::make_shared<Outcome>();
  const std::vector<std::byte> payload(20'000, std::byte{5});  // more messages than the peer has buffers
  const auto operation = a.start(one_sided(TransferKind::write, {a.at(0, page)}, {1}, payload), outcome);
  while (post(a, b)) {
    a.protocol->completed();
  }
  receive_all(b);
  ASSERT_TRUE(b.protocol->unfinished_since()) << "else it isn't in the middle of it";
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(outcome->calls, 0) << "the peer will have it";
  EXPECT_TRUE(a.protocol->draining_since());
  exchange();
  EXPECT_FALSE(b.protocol->unfinished_since()) << "the peer would give up the connection after a while";
  EXPECT_EQ(b.host->notifications, std::vector(1, payload));
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_FALSE(outcome->ec) << outcome->ec.message();
  EXPECT_TRUE(a.protocol->settled());
}

TEST_F(RailProtocolNotify, OneThatHasNotBegunIsNotSentOnceItsWriteIsStopped) {
  const std::vector<std::byte> payload(20'000, std::byte{5});
  const auto first = std::make_shared<Outcome>();
  const auto second = std::make_shared<Outcome>();
  a.start(one_sided(TransferKind::write, {}, {}, payload), first);
  const auto operation = a.start(one_sided(TransferKind::write, {}, {}, payload), second);
  while (post(a, b)) {
    a.protocol->completed();
  }
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(second->ec, errc::cancelled);
  exchange();
  EXPECT_EQ(b.host->notifications.size(), 1U);
  EXPECT_FALSE(first->ec) << first->ec.message();
}

TEST_F(RailProtocolNotify, AnAnswerToOneThatIsNotWholeIsAViolation) {
  a.start(one_sided(TransferKind::write, {}, {}, std::vector<std::byte>(20'000)), std::make_shared<Outcome>())
      ->request_stop(errc::cancelled);
  const auto operation =
      a.start(one_sided(TransferKind::write, {}, {}, std::vector<std::byte>(20'000)), std::make_shared<Outcome>());
  ASSERT_TRUE(post(a, b));
  operation->request_stop(errc::cancelled);
  MessageHeader ack;
  ack.type = MessageType::notify_ack;
  ack.operation = 2;
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&ack, 1))), errc::protocol_violation);
}

TEST_F(RailProtocolNotify, WhereNobodyAnswersAReadsErrorSaysThatItsNotificationMayCome) {
  const auto outcome = std::make_shared<Outcome>();
  read(outcome);
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  ASSERT_TRUE(post(a, b));
  a.protocol->fail(errc::timed_out, "no answer");
  EXPECT_EQ(outcome->ec, condition::may_still_land) << outcome->ec.message();
  EXPECT_EQ(outcome->count, 2U);
}

TEST_F(RailProtocolNotify, AnAnswerToAReadThatHasSaidNothingIsAViolation) {
  read(std::make_shared<Outcome>());
  ASSERT_TRUE(post(a, b));
  MessageHeader ack;
  ack.type = MessageType::notify_ack;
  ack.operation = 1;
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&ack, 1))), errc::protocol_violation);
}

}  // namespace
}  // namespace kvferry::rdma::testing
