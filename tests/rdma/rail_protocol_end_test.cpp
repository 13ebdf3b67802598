// SPDX-License-Identifier: Apache-2.0
// When an operation that is given up has ended, and what its error says of what is still under way.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/rdma_error.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolEnd : public TwoSides {
 protected:
  RailProtocolEnd() : TwoSides(64) {}

  std::shared_ptr<kit::Operation> write(const std::shared_ptr<Outcome>& outcome, std::vector<std::byte> notification) {
    return a.start(one_sided(TransferKind::write, {a.at(0, page)}, {7}, std::move(notification)), outcome);
  }
};

TEST_F(RailProtocolEnd, AGivenUpWriteThatLandsAllTheSameHasSucceeded) {
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = write(outcome, {});
  ASSERT_TRUE(post(a, b));
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(outcome->calls, 0) << "it is with the adapter";
  a.protocol->completed();
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, std::error_code());
  EXPECT_EQ(outcome->count, 1U);
}

TEST_F(RailProtocolEnd, AWriteOfWhichNothingIsPostedEndsAtOnce) {
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = write(outcome, {std::byte{1}});
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(outcome->ec, errc::cancelled);
  EXPECT_NE(outcome->ec, condition::may_still_land);
  EXPECT_FALSE(post(a, b)) << "nor is anything said of it later";
}

TEST_F(RailProtocolEnd, AWriteWhoseNotificationIsUnderWayEndsWithItsAnswer) {
  const auto outcome = std::make_shared<Outcome>();
  const auto operation = write(outcome, {std::byte{1}});
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(outcome->calls, 0) << "the notification may be handed over yet";
  EXPECT_TRUE(a.protocol->draining_since().has_value());
  receive_all(b);
  ASSERT_EQ(b.host->notifications.size(), 1U);
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, std::error_code());
  EXPECT_EQ(outcome->count, 1U);
  EXPECT_FALSE(a.protocol->draining_since().has_value());
}

TEST_F(RailProtocolEnd, WhereNobodyAnswersTheErrorSaysThatItMayStillLand) {
  for (const bool completes : {false, true}) {
    SCOPED_TRACE(completes);
    Side from(64, buffers);
    from.join(b);
    const auto outcome = std::make_shared<Outcome>();
    const auto operation = from.start(one_sided(TransferKind::write, {from.at(0, page)}, {7}, {std::byte{1}}), outcome);
    ASSERT_TRUE(post(from, b));
    if (completes) {
      from.protocol->completed();
    }
    operation->request_stop(errc::cancelled);
    EXPECT_TRUE(from.protocol->cut_off(kit::Clock::now())) << "the queue pair has to go";
    from.protocol->fail(errc::connection_lost, "did not complete");
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_EQ(outcome->ec, errc::cancelled_in_flight);
    EXPECT_EQ(outcome->ec, condition::may_still_land);
  }
}

TEST_F(RailProtocolEnd, WhateverBreaksTheQueuePairWhatIsUnderWayMayLand) {
  const auto posted = std::make_shared<Outcome>();
  write(posted, {});
  ASSERT_TRUE(post(a, b));
  a.protocol->fail(std::make_error_code(std::errc::network_down), "the port's link went down");
  EXPECT_EQ(posted->ec, condition::may_still_land) << posted->ec.message();
  EXPECT_EQ(posted->ec, condition::retryable);
}

TEST_F(RailProtocolEnd, WhatOneOperationDidIsNoOthersError) {
  const auto refused = std::make_shared<Outcome>();
  const auto beside = std::make_shared<Outcome>();
  write(refused, {});
  ASSERT_TRUE(a.protocol->fill(*list_));
  a.start(one_sided(TransferKind::read, {a.at(page, page)}, {9}), beside);
  const std::error_code cause = wc_status::remote_access_error;
  a.protocol->fail(cause, "refused", (*list_)[0].wr_id);
  EXPECT_EQ(refused->ec, cause);
  EXPECT_EQ(beside->ec, errc::connection_lost);
  // What the other rails of the link are told.
  EXPECT_EQ(RailProtocol::cause_for_others(cause, (*list_)[0].wr_id), errc::connection_lost);
  EXPECT_EQ(RailProtocol::cause_for_others(wc_status::retry_exceeded, 1), wc_status::retry_exceeded);
  EXPECT_EQ(RailProtocol::cause_for_others(errc::protocol_violation, 0), errc::protocol_violation);
}

TEST_F(RailProtocolEnd, WhatThePeersAdapterRefusedIsNotUnderWay) {
  const auto outcome = std::make_shared<Outcome>();
  write(outcome, {});
  ASSERT_TRUE(a.protocol->fill(*list_));
  a.protocol->fail(wc_status::remote_access_error, "refused", (*list_)[0].wr_id);
  EXPECT_EQ(outcome->ec, wc_status::remote_access_error);
  EXPECT_NE(outcome->ec, condition::may_still_land);
}

TEST_F(RailProtocolEnd, ASendOfWhichAllIsSaidEndsWithItsAnswer) {
  for (const bool recv_is_gone : {false, true}) {
    SCOPED_TRACE(recv_is_gone);
    Side from(64, buffers);
    Side to(64, buffers);
    from.join(to);
    to.join(from);
    const auto received = std::make_shared<Outcome>();
    const auto sent = std::make_shared<Outcome>();
    const auto recv = to.start(paired(TransferKind::recv, {to.at(0, 100)}, 1), received);
    ASSERT_TRUE(post(to, from));
    to.protocol->completed();
    receive_all(from);
    const auto send = from.start(paired(TransferKind::send, {from.at(0, 100)}, 1), sent);
    ASSERT_TRUE(post(from, to));
    from.protocol->completed();
    if (recv_is_gone) {
      recv->request_stop(errc::cancelled);
    }
    send->request_stop(errc::cancelled);
    EXPECT_EQ(sent->calls, 0);
    receive_all(to);
    ASSERT_TRUE(post(to, from));
    receive_all(from);
    EXPECT_EQ(sent->calls, 1);
    EXPECT_EQ(sent->ec, recv_is_gone ? std::error_code(errc::cancelled) : std::error_code());
    EXPECT_EQ(received->ec, recv_is_gone ? std::error_code(errc::cancelled) : std::error_code());
  }
}

TEST_F(RailProtocolEnd, ASendThatHasBeenAcknowledgedArrivedAndIsAnsweredOnce) {
  // One object is written into the recv's buffer, the other one comes in a message.
  const auto objects_of = [](Side& side) { return std::vector{side.at(0, page), side.at(page, 100)}; };
  a.memory[7] = std::byte{1};
  const auto received = std::make_shared<Outcome>();
  const auto sent = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, objects_of(b), 1), received);
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  const auto send = a.start(paired(TransferKind::send, objects_of(a), 1), sent);
  while (post(a, b)) {
  }
  receive_all(b);
  EXPECT_EQ(received->count, 2U);
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  EXPECT_EQ(sent->calls, 0) << "what was written is with the adapter, as far as is known here";
  send->request_stop(errc::cancelled);
  EXPECT_FALSE(post(a, b)) << "the peer need not be told";
  while (a.protocol->posted() != 0) {
    a.protocol->completed();
  }
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, std::error_code());
  EXPECT_EQ(sent->count, 2U);
  EXPECT_EQ(b.memory[7], std::byte{1});
  EXPECT_TRUE(a.protocol->idle());
}

class RailProtocolEndOfHalfASend : public RailProtocolEnd {
 protected:
  /// Starts a send of several messages, of which all that b has receive buffers for are there, and gives it up.
  RailProtocolEndOfHalfASend() {
    recv_ = b.start(paired(TransferKind::recv, objects(b), 1), received);
    pass_on(b, a);
    b.protocol->completed();
    receive_all(a);
    const auto send = a.start(paired(TransferKind::send, objects(a), 1), sent);
    pass_on(a, b);
    a.protocol->completed();
    send->request_stop(errc::cancelled);
  }

  static std::vector<MutableBuffer> objects(Side& side) {
    std::vector<MutableBuffer> all;
    for (std::size_t i = 0; i < 100; ++i) {
      all.push_back(side.at(i * 100, 100));
    }
    return all;
  }

  void pass_on(Side& from, Side& to) { EXPECT_TRUE(post(from, to)); }

  /// The messages that are left, until nobody has any.
  void exchange() {
    for (bool busy = true; busy;) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&b, &a}, std::pair{&a, &b}}) {
        receive_all(*from);
        if (post(*from, *to)) {
          from->protocol->completed();
          busy = true;
        }
      }
    }
  }

  const std::shared_ptr<Outcome> received = std::make_shared<Outcome>();
  const std::shared_ptr<Outcome> sent = std::make_shared<Outcome>();
  std::shared_ptr<kit::Operation> recv_;
};

TEST_F(RailProtocolEndOfHalfASend, EndsWhenThePeerHasTakenWhatItTakes) {
  ASSERT_FALSE(b.arrived.empty());
  EXPECT_EQ(sent->calls, 0) << "the peer puts it into the recv's buffers yet";
  EXPECT_TRUE(a.protocol->draining_since().has_value());
  exchange();
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, errc::cancelled);
  EXPECT_NE(sent->ec, condition::may_still_land);
  EXPECT_EQ(received->ec, errc::peer_cancelled);
  EXPECT_FALSE(a.protocol->draining_since().has_value());
  EXPECT_TRUE(a.protocol->idle());
}

TEST_F(RailProtocolEndOfHalfASend, EndsThoughTheRecvIsGivenUpToo) {
  recv_->request_stop(errc::timed_out);
  exchange();
  EXPECT_EQ(sent->ec, errc::cancelled);
  EXPECT_EQ(received->ec, errc::timed_out);
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(received->calls, 1);
}

TEST_F(RailProtocolEndOfHalfASend, SaysThatItMayLandWhereNobodyAnswers) {
  EXPECT_TRUE(a.protocol->cut_off(kit::Clock::now())) << "the queue pair has to go";
  a.protocol->fail(errc::connection_lost, "did not answer");
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, errc::cancelled_in_flight);
}

TEST_F(RailProtocolEndOfHalfASend, IsNotTakenForArrived) {
  MessageHeader ack;
  ack.type = MessageType::send_ack;
  std::memcpy(&ack.operation, b.arrived.back().data() + offsetof(MessageHeader, tag), sizeof(ack.operation));
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&ack, 1))), errc::protocol_violation);
  EXPECT_EQ(sent->calls, 0);
}

TEST_F(RailProtocolEnd, ASendIsTakenForArrivedOnlyIfThePeerSaysSo) {
  const auto received = std::make_shared<Outcome>();
  const auto sent = std::make_shared<Outcome>();
  b.start(paired(TransferKind::recv, {b.at(0, 100)}, 1), received);
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  a.start(paired(TransferKind::send, {a.at(0, 100)}, 1), sent);
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  MessageHeader ack;
  ack.type = MessageType::send_ack;
  std::memcpy(&ack.operation, b.arrived.back().data() + offsetof(MessageHeader, tag), sizeof(ack.operation));
  ack.status = static_cast<std::uint32_t>(errc::count_mismatch);
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&ack, 1))), errc::protocol_violation);
  EXPECT_EQ(sent->calls, 0);
}

TEST_F(RailProtocolEnd, AFenceIsAnsweredWhenTheWritesBeforeItHaveEnded) {
  const auto before = std::make_shared<Outcome>();
  write(before, {});
  ASSERT_TRUE(post(a, b));
  int fenced = 0;
  b.protocol->fence([&] { ++fenced; });
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  a.protocol->begin_fences(1);
  const auto later = std::make_shared<Outcome>();
  a.start(one_sided(TransferKind::write, {a.at(page, page)}, {9}), later);
  a.protocol->completed();
  EXPECT_EQ(before->calls, 1);
  ASSERT_TRUE(post(a, b)) << "the answer, and the later write, which it doesn't wait for";
  receive_all(b);
  EXPECT_EQ(fenced, 1);
  EXPECT_EQ(later->calls, 0);
}

TEST_F(RailProtocolEnd, AFenceThatComesWhileThisSideLooksForWritesWaitsForTheNextLook) {
  // A driver counts the fences, takes what has been started, and looks at completions while it deals with that.
  const std::size_t asked = a.protocol->fences_asked();
  int fenced = 0;
  b.protocol->fence([&] { ++fenced; });
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  a.protocol->begin_fences(asked);
  EXPECT_FALSE(post(a, b)) << "a write may have been started before the question that is not known here yet";
  const auto next = a.protocol->fences_asked();
  EXPECT_EQ(next, 1U);
  const auto started = std::make_shared<Outcome>();
  write(started, {});
  a.protocol->begin_fences(next);
  ASSERT_TRUE(post(a, b));
  receive_all(b);
  EXPECT_EQ(fenced, 0);
  a.protocol->completed();
  EXPECT_EQ(started->calls, 1);
  ASSERT_TRUE(post(a, b));
  receive_all(b);
  EXPECT_EQ(fenced, 1);
}

TEST_F(RailProtocolEnd, AnswersThatThePeerDoesNotTakeAreBounded) {
  Side side(1, 2 * max_queued_answers);
  side.join(b);
  MessageHeader fence;
  fence.type = MessageType::fence;
  std::error_code ec;
  for (fence.operation = 1; !ec && fence.operation <= 2 * max_queued_answers; ++fence.operation) {
    ec = side.protocol->received(std::as_bytes(std::span(&fence, 1)));
    side.protocol->begin_fences(side.protocol->fences_asked());
  }
  EXPECT_EQ(ec, errc::protocol_violation);
  EXPECT_EQ(fence.operation - 1, max_queued_answers + 1);
}

TEST_F(RailProtocolEnd, AFenceHoldsUntilThen) {
  write(std::make_shared<Outcome>(), {});
  ASSERT_TRUE(post(a, b));
  int fenced = 0;
  b.protocol->fence([&] { ++fenced; });
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  a.protocol->begin_fences(1);
  EXPECT_FALSE(post(a, b));
  EXPECT_EQ(fenced, 0);
  b.protocol->fail(errc::connection_lost, "the queue pair is gone");
  EXPECT_EQ(fenced, 1) << "without it nothing lands";
  b.protocol->fence([&] { ++fenced; });
  EXPECT_EQ(fenced, 2);
}

TEST_F(RailProtocolEnd, ASignOfLifeIsGivenByWhatWasPostedAfterTheQuestion) {
  write(std::make_shared<Outcome>(), {});
  ASSERT_TRUE(post(a, b));
  int answered = 0;
  ASSERT_TRUE(a.protocol->fill_probe(*list_, [&] { ++answered; }));
  a.protocol->completed();
  EXPECT_EQ(answered, 0) << "this one was posted before";
  a.protocol->completed();
  EXPECT_EQ(answered, 1);
}

/// Each has used up its credits with what the other has to answer.
TEST_F(RailProtocolEnd, TwoThatLeaveAtOnceGiveEachOtherTheCreditsForTheirAnswers) {
  std::vector<std::shared_ptr<Outcome>> outcomes;
  for (Side* const side : {&a, &b}) {
    for (std::size_t i = 0; i + 1 < buffers; ++i) {  // the last credit is for credits
      outcomes.push_back(std::make_shared<Outcome>());
      side->start(one_sided(TransferKind::write, {}, {}, {std::byte{1}}), outcomes.back());
    }
  }
  for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
    while (post(*from, *to)) {
      from->protocol->completed();
    }
    ASSERT_EQ(to->arrived.size(), buffers - 1);
  }
  receive_all(a);
  receive_all(b);
  a.protocol->leave();
  b.protocol->leave();
  for (bool busy = true; busy;) {
    busy = false;
    for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
      while (from->protocol->fill_answers(*list_)) {
        busy = true;
        for (const ibv_send_wr* request = list_->finish(); request != nullptr; request = request->next) {
          carry_out(*request, *to);
        }
        from->protocol->completed();
      }
      receive_all(*to);
    }
  }
  EXPECT_TRUE(a.protocol->settled() && b.protocol->settled());
  for (const auto& outcome : outcomes) {
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_FALSE(outcome->ec) << outcome->ec.message();
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
