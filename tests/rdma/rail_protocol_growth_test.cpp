// SPDX-License-Identifier: Apache-2.0
// A rail has little memory for messages at first, and more once a side waits for want of it.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolGrowth : public TwoSides {
 protected:
  static constexpr std::size_t most_buffers = 4 * min_first_messages;

  RailProtocolGrowth() : TwoSides(64) { join(min_first_messages, most_buffers, 4 * slot_count); }

  void join(std::size_t first, std::size_t most, std::size_t slots) {
    for (Side* const side : {&a, &b}) {
      side->first_buffers = first;
      side->own_buffers = most;
      side->most_slots = slots;
    }
    a.join(b);
    b.join(a);
  }

  void notify(Side& from, std::size_t count, std::size_t size = 1) {
    for (std::size_t i = 0; i < count; ++i) {
      outcomes_.push_back(std::make_shared<Outcome>());
      from.start(one_sided(TransferKind::write, {}, {}, std::vector<std::byte>(size, std::byte{7})), outcomes_.back());
    }
  }
  /// Until neither side has anything to do. What a side posts arrives, but isn't taken, until nothing more goes out.
  void run_in_bursts(bool grows = true) {
    for (bool busy = true; busy;) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        while (post(*from, *to)) {
          from->protocol->completed();
          busy = true;
          ASSERT_LE(to->arrived.size(), to->protocol->buffer_count())
              << "a message that would have found no receive buffer";
        }
        receive_all(*to);
        if (grows) {
          busy = from->grow() || to->grow() || busy;
        }
      }
    }
  }
  void expect_all_ended() {
    for (const auto& outcome : outcomes_) {
      ASSERT_EQ(outcome->calls, 1);
      ASSERT_FALSE(outcome->ec) << outcome->ec.message();
    }
    outcomes_.clear();
    for (const auto& [side, peer] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
      EXPECT_EQ(side->protocol->credits() + peer->protocol->owed(), peer->protocol->buffer_count());
    }
  }

  std::vector<std::shared_ptr<Outcome>> outcomes_;
};

TEST_F(RailProtocolGrowth, WhatIsAnsweredOneByOneNeedsNoMoreThanThereIsAtFirst) {
  for (int i = 0; i < 100; ++i) {
    notify(a, 1);
    (void)move();
    notify(b, 1, 100);
    (void)move();
  }
  expect_all_ended();
  for (const Side* const side : {&a, &b}) {
    EXPECT_EQ(side->protocol->buffer_count(), min_first_messages);
    EXPECT_EQ(side->protocol->slot_count(), slot_count);
  }
}

TEST_F(RailProtocolGrowth, APeerThatUsesAllBuffersUpGetsMoreUpToTheAgreedNumber) {
  notify(a, 200, 500);
  run_in_bursts();
  expect_all_ended();
  EXPECT_EQ(b.host->notifications.size(), 200U);
  EXPECT_EQ(b.protocol->buffer_count(), most_buffers);
  EXPECT_GT(b.most_arrived, min_first_messages) << "it is told of them";
}

TEST_F(RailProtocolGrowth, APeerThatIsAnsweredNothingGetsMore) {
  // Parts of a notification, which alone have no answer.
  notify(a, 1, max_notification_bytes);
  while (post(a, b)) {
    a.protocol->completed();
    receive_all(b);
    (void)b.grow();
    while (post(b, a)) {
      b.protocol->completed();
      receive_all(a);
    }
  }
  expect_all_ended();
  EXPECT_EQ(b.protocol->buffer_count(), most_buffers);
  EXPECT_EQ(a.protocol->buffer_count(), min_first_messages) << "which took credits only";
}

TEST_F(RailProtocolGrowth, WhatIsNewIsToldAtOnceAndIsNoReasonToGrowMore) {
  notify(a, 10);
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  EXPECT_FALSE(post(a, b)) << "the last credit is for credits";
  receive_all(b);
  ASSERT_TRUE(b.protocol->wants_buffers());
  (void)b.grow();
  EXPECT_EQ(b.protocol->buffer_count(), 2 * min_first_messages);
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  EXPECT_EQ(a.protocol->credits() + b.protocol->owed(), 2 * min_first_messages);
  b.protocol->add_buffers(2 * min_first_messages);
  for (int i = 0; i < 3; ++i) {
    while (post(b, a)) {
      b.protocol->completed();
      receive_all(a);
    }
  }
  EXPECT_FALSE(b.protocol->wants_buffers());
  EXPECT_EQ(b.protocol->owed(), 0U) << "no answer was due, and yet it is told";
}

TEST_F(RailProtocolGrowth, WithoutMemoryForMoreEverythingGoesThroughWhatThereIs) {
  a.protocol->stay_small();
  b.protocol->stay_small();
  for (int i = 0; i < 5; ++i) {
    notify(a, 40, 2'000);
    notify(b, 40, 3'000);
    std::vector<MutableBuffer> objects;
    std::vector<MutableBuffer> targets;
    for (std::size_t j = 0; j < 20; ++j) {
      objects.push_back(a.at(j * page, 300));
      targets.push_back(b.at(j * page, 300));
    }
    outcomes_.push_back(std::make_shared<Outcome>());
    b.start(paired(TransferKind::recv, targets, 1), outcomes_.back());
    outcomes_.push_back(std::make_shared<Outcome>());
    a.start(paired(TransferKind::send, objects, 1), outcomes_.back());
    run_in_bursts(false);
    expect_all_ended();
  }
  for (Side* const side : {&a, &b}) {
    EXPECT_FALSE(side->grow());
    EXPECT_EQ(side->protocol->buffer_count(), min_first_messages);
    EXPECT_EQ(side->protocol->slot_count(), slot_count);
  }
}

TEST_F(RailProtocolGrowth, WhereNoMoreBuffersCanBeHadThosePostedByThenDo) {
  const auto fill_up = [&](std::size_t count) {
    notify(a, count, 500);
    while (post(a, b)) {
      a.protocol->completed();
    }
    receive_all(b);
  };
  fill_up(100);
  (void)b.grow();
  ASSERT_EQ(b.protocol->buffer_count(), 2 * min_first_messages);
  ASSERT_TRUE(post(b, a));  // tells of them
  b.protocol->completed();
  receive_all(a);
  fill_up(0);
  ASSERT_TRUE(b.protocol->wants_buffers());
  b.protocol->stay_small();
  EXPECT_FALSE(b.protocol->wants_buffers());
  notify(a, 100, 500);
  run_in_bursts();
  expect_all_ended();
  EXPECT_EQ(b.host->notifications.size(), 200U);
  EXPECT_EQ(b.protocol->buffer_count(), 2 * min_first_messages) << "it asks for no more from then on";
}

TEST_F(RailProtocolGrowth, WhereNoMorePlacesCanBeHadMessagesWaitForOne) {
  join(most_buffers, most_buffers, 2 * slot_count);
  notify(a, 10 * slot_count);
  ASSERT_TRUE(post(a, b));
  EXPECT_FALSE(post(a, b));
  ASSERT_TRUE(a.protocol->wants_slots());
  a.protocol->stay_small();
  EXPECT_FALSE(a.protocol->wants_slots());
  EXPECT_FALSE(post(a, b));
  EXPECT_FALSE(a.protocol->wants_slots()) << "it asks for no more from then on";
  a.protocol->completed();
  run_in_bursts();
  expect_all_ended();
  EXPECT_EQ(b.host->notifications.size(), 10 * slot_count);
  EXPECT_EQ(a.protocol->slot_count(), slot_count);
}

TEST_F(RailProtocolGrowth, APeerThatSendsMoreThanItWasToldOfIsAViolation) {
  MessageHeader credit;
  credit.type = MessageType::credit;
  const auto receive = [&] { return b.protocol->received(std::as_bytes(std::span(&credit, 1))); };
  for (std::size_t i = 0; i < min_first_messages; ++i) {
    ASSERT_FALSE(receive()) << b.protocol->violation();
  }
  (void)b.grow();  // of which it hasn't been told
  ASSERT_EQ(b.protocol->owed(), b.protocol->buffer_count());
  EXPECT_EQ(receive(), errc::protocol_violation);
  EXPECT_NE(b.protocol->violation().find("8 receive buffers"), std::string::npos) << b.protocol->violation();
}

TEST_F(RailProtocolGrowth, MessagesThatWaitForAPlaceGetMoreOfThem) {
  join(most_buffers, most_buffers, 2 * slot_count);
  notify(a, slot_count);
  ASSERT_TRUE(post(a, b));
  EXPECT_FALSE(post(a, b));
  EXPECT_FALSE(a.protocol->wants_slots()) << "nothing waits";
  notify(a, 2 * slot_count);
  EXPECT_FALSE(post(a, b));
  ASSERT_TRUE(a.protocol->wants_slots());
  (void)a.grow();
  EXPECT_EQ(a.protocol->slot_count(), 2 * slot_count);
  ASSERT_TRUE(post(a, b));
  ASSERT_EQ(list_->size(), slot_count);
  for (std::size_t i = 0; i < list_->size(); ++i) {
    const std::uint64_t place = (*list_)[i].sg_list[0].addr;
    const std::uint64_t begin = address_of(a.more_slots.front().data());
    EXPECT_EQ((place - begin) % small_message, 0U);
    EXPECT_LT((place - begin) / small_message, slot_count);
    EXPECT_EQ((*list_)[i].sg_list[0].lkey, first_slots_key + 1);
  }
  EXPECT_FALSE(post(a, b));
  EXPECT_FALSE(a.protocol->wants_slots()) << "there may be no more";
  a.protocol->completed();
  a.protocol->completed();
  run_in_bursts();
  expect_all_ended();
}

}  // namespace
}  // namespace kvferry::rdma::testing
