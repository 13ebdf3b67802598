// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolRegions : public TwoSides {
 protected:
  RailProtocolRegions() : TwoSides(64) {}

  TransferRequest write_to(std::uint32_t region, std::size_t count) {
    std::vector<MutableBuffer> objects;
    std::vector<std::uint64_t> indexes;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(a.at(i * page, page));
      indexes.push_back(i);
    }
    TransferRequest request = one_sided(TransferKind::write, std::move(objects), std::move(indexes));
    request.remote_region = region;
    return request;
  }

  std::shared_ptr<Outcome> start(TransferRequest request) {
    auto outcome = std::make_shared<Outcome>();
    a.start(std::move(request), outcome);
    return outcome;
  }

  /// All that both have to say, but for what a side's adapter has been given and not completed.
  void exchange() {
    for (bool busy = true; busy;) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        if (post(*from, *to)) {
          from->protocol->completed();
          busy = true;
        }
        receive_all(*to);
      }
    }
  }

  /// b takes a region back of which a has heard when a's adapter has a write to it. @return whether all of it was sent.
  [[nodiscard]] bool remove_behind_a_write(std::uint32_t number, bool& gone) {
    const bool posted = post(a, b);
    b.take_region_back(number);
    b.protocol->region_removed(number, [&gone] { gone = true; });
    const bool told = post(b, a);
    b.protocol->completed();
    receive_all(a);
    return posted && told;
  }

  /// A message as the peer may send it.
  [[nodiscard]] std::error_code hear(MessageHeader header, AddedRegion region, const std::vector<std::uint32_t>& keys) {
    std::vector<std::byte> message(sizeof(header) + sizeof(region) + keys.size() * sizeof(std::uint32_t));
    header.body_bytes = static_cast<std::uint32_t>(message.size() - sizeof(header));
    std::memcpy(message.data(), &header, sizeof(header));
    std::memcpy(message.data() + sizeof(header), &region, sizeof(region));
    if (!keys.empty()) {
      std::memcpy(message.data() + sizeof(header) + sizeof(region), keys.data(), keys.size() * sizeof(std::uint32_t));
    }
    return a.protocol->received(message);
  }
  [[nodiscard]] static MessageHeader added(std::uint64_t number, std::uint64_t bytes, std::uint32_t count) {
    MessageHeader header;
    header.type = MessageType::region_added;
    header.flags = MessageHeader::last;
    header.operation = number;
    header.tag = bytes;
    header.status = static_cast<std::uint32_t>(Access::read_write);
    header.count = count;
    return header;
  }
};

TEST_F(RailProtocolRegions, ARegionThatIsToldIsWrittenTo) {
  const std::uint32_t number = b.add_region(8 * page, 4 * page);
  b.protocol->region_added();
  exchange();
  ASSERT_EQ(a.host->added.size(), 1U);
  EXPECT_EQ(a.host->added[0], (RemoteRegion{4 * page, page, Access::read_write, number}));
  std::memset(a.memory.data(), 7, page);
  const auto outcome = start(write_to(number, 1));
  exchange();
  EXPECT_EQ(outcome->ec, std::error_code());
  EXPECT_EQ(outcome->count, 1U);
  EXPECT_EQ(b.memory[8 * page], std::byte{7});
  b.protocol->region_added();
  EXPECT_FALSE(post(b, a)) << "it has been told";
}

TEST_F(RailProtocolRegions, NewsHaveTheKeysOfAllRails) {
  for (Side* const side : {&a, &b}) {
    side->rails = {0, 4};
    side->join(side == &a ? b : a);
  }
  const std::uint32_t number = b.add_region(8 * page, 4 * page);
  b.protocol->region_added();
  exchange();
  ASSERT_EQ(a.host->added.size(), 1U);
  const auto known = a.link_regions->peers();
  const PeerRegion* const region = known->find(number);
  ASSERT_NE(region, nullptr);
  ASSERT_EQ(region->keys.size(), 2U);
  EXPECT_EQ(region->keys[1].keys, (std::vector<std::uint32_t>{1, 1}));
  EXPECT_FALSE(known->outdated());
  EXPECT_TRUE(a.link_regions->add({number, page, {}}, [] { return false; }));
  EXPECT_FALSE(known->outdated()) << "heard of before, on another rail";
}

TEST_F(RailProtocolRegions, ARemovalIsConfirmedBehindWhatTheAdapterHas) {
  const std::uint32_t number = b.add_region(8 * page, 4 * page);
  b.protocol->region_added();
  exchange();
  const auto posted = start(write_to(number, 4));
  bool gone = false;
  ASSERT_TRUE(remove_behind_a_write(number, gone));
  EXPECT_EQ(a.host->removed, (std::vector<std::uint32_t>{number}));
  EXPECT_FALSE(post(a, b)) << "the write is under way";
  const auto late = start(write_to(number, 1));
  EXPECT_EQ(late->ec, errc::region_gone);
  a.protocol->completed();
  EXPECT_EQ(posted->ec, std::error_code());
  EXPECT_EQ(posted->count, 4U);
  EXPECT_FALSE(gone);
  exchange();
  EXPECT_TRUE(gone);
  const auto other = start(write_to(0, 1));
  exchange();
  EXPECT_EQ(other->count, 1U);
}

TEST_F(RailProtocolRegions, WhatIsNotPostedOfAnOperationEndsWithTheRegion) {
  const std::uint32_t number = b.add_region(8 * page, 40 * page);
  b.protocol->region_added();
  exchange();
  const auto outcome = start(write_to(number, 40));
  bool gone = false;
  ASSERT_TRUE(remove_behind_a_write(number, gone));
  EXPECT_EQ(outcome->calls, 0) << "some of it is under way";
  EXPECT_FALSE(post(a, b)) << "no further request, and no answer yet";
  a.protocol->completed();
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, errc::region_gone);
  EXPECT_GT(outcome->count, 0U);
  EXPECT_LT(outcome->count, 40U);
  EXPECT_FALSE(gone);
  exchange();
  EXPECT_TRUE(gone);
}

TEST_F(RailProtocolRegions, RangesAreLookedUpTooAndOtherRegionsGoOn) {
  const std::uint32_t number = b.add_region(8 * page, 40 * page);
  b.protocol->region_added();
  exchange();
  const auto to_ranges = [&](std::vector<std::uint32_t> regions) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "peer";
    for (std::size_t i = 0; i < regions.size(); ++i) {
      request.objects.push_back(a.at(i * page, page));
      request.remote_ranges.push_back(RemoteRange::contiguous(regions[i], i * page, page));
    }
    return request;
  };
  const auto uses = start(to_ranges(std::vector<std::uint32_t>{0, number, 0}));
  const auto others = start(to_ranges(std::vector<std::uint32_t>{0, 0}));
  b.take_region_back(number);
  b.protocol->region_removed(number, [] {});
  ASSERT_TRUE(post(b, a));
  receive_all(a);
  EXPECT_EQ(uses->ec, errc::region_gone);
  EXPECT_EQ(start(to_ranges({0, number}))->ec, errc::region_gone);
  EXPECT_EQ(others->calls, 0);
  exchange();
  EXPECT_EQ(others->count, 2U);
}

TEST_F(RailProtocolRegions, WhatChangedSinceTheHandshakeIsToldAtTheBeginning) {
  b.take_region_back(0);
  const std::uint32_t kept = b.add_region(8 * page, page);
  b.take_region_back(b.add_region(9 * page, page));
  b.protocol->region_added();
  exchange();
  EXPECT_EQ(a.host->removed, (std::vector<std::uint32_t>{0, kept + 1}));
  ASSERT_EQ(a.host->added.size(), 1U);
  EXPECT_EQ(a.host->added[0].number, kept);
  EXPECT_EQ(start(write_to(0, 1))->ec, errc::region_gone);
}

TEST_F(RailProtocolRegions, ARegionThatIsNotRegisteredAnyMoreIsToldAsGone) {
  const std::uint32_t number = b.add_region(8 * page, page);
  b.keys_asked_for = [this](std::uint32_t asked) {
    b.take_region_back(asked);
    b.keys.clear();
  };
  b.protocol->region_added();
  exchange();
  EXPECT_TRUE(a.host->added.empty());
  EXPECT_EQ(a.host->removed, (std::vector<std::uint32_t>{number}));
}

TEST_F(RailProtocolRegions, ARegionWhoseKeysWentWithTheLinkAloneIsNotToldAsGone) {
  (void)b.add_region(8 * page, page);
  b.keys.clear();
  b.protocol->region_added();
  exchange();
  EXPECT_TRUE(a.host->added.empty());
  EXPECT_TRUE(a.host->removed.empty());
}

TEST_F(RailProtocolRegions, AQuestionIsAnsweredBehindTheNews) {
  std::size_t heard = 0;
  (void)b.add_region(8 * page, page);
  (void)b.add_region(9 * page, page);
  a.protocol->ask_regions([&] { heard = a.host->added.size(); });
  exchange();
  EXPECT_EQ(heard, 2U);
}

TEST_F(RailProtocolRegions, ARemovalEndsWithTheQueuePair) {
  int gone = 0;
  b.take_region_back(0);
  b.protocol->region_removed(0, [&] { ++gone; });
  b.protocol->region_removed(0, [&] { ++gone; });
  ASSERT_TRUE(post(b, a));
  b.protocol->fail(errc::connection_lost, "the test says so");
  EXPECT_EQ(gone, 2);
  b.protocol->region_removed(0, [&] { ++gone; });
  EXPECT_EQ(gone, 3);
}

TEST_F(RailProtocolRegions, SenselessNewsBreakTheConnection) {
  const AddedRegion good{1 << 20, page, page};
  EXPECT_EQ(hear(added(1, 2 * page, 2), good, {5, 6}), std::error_code());
  struct Case {
    const char* what;
    MessageHeader header;
    AddedRegion region;
    std::vector<std::uint32_t> keys;
  };
  auto wrong_access = added(2, page, 1);
  wrong_access.status = 4;
  auto not_last = added(2, page, 1);
  not_last.flags = 0;
  auto other_rail = added(2, page, 1);
  other_rail.first = 1;
  const std::vector<Case> cases{
      {"too few keys", added(2, 2 * page, 1), good, {5}},
      {"other keys than it says", added(2, page, 2), good, {5}},
      {"no whole pages", added(2, page + 1, 1), good, {5}},
      {"no bytes", added(2, 0, 0), good, {}},
      {"no pages", added(2, page, 1), {1 << 20, page, 0}, {5}},
      {"no slices", added(2, page, 1), {1 << 20, 0, page}, {5}},
      {"beyond all memory", added(2, page, 1), {~std::uint64_t{0}, page, page}, {5}},
      {"a number that there can't be", added(std::uint64_t{1} << 31, page, 1), good, {5}},
      {"access", wrong_access, good, {5}},
      {"not the last", not_last, good, {5}},
      {"another rail", other_rail, good, {5}},
  };
  for (const Case& one : cases) {
    EXPECT_EQ(hear(one.header, one.region, one.keys), errc::protocol_violation) << one.what;
    EXPECT_FALSE(a.protocol->violation().empty());
  }
  MessageHeader answer;
  answer.type = MessageType::region_removed_ack;
  answer.operation = 1;
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&answer, 1))), errc::protocol_violation);
  answer.type = MessageType::regions_answer;
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&answer, 1))), errc::protocol_violation);
  answer.type = MessageType::region_removed;
  answer.operation = std::uint64_t{1} << 31;
  EXPECT_EQ(a.protocol->received(std::as_bytes(std::span(&answer, 1))), errc::protocol_violation);
  a.host->most_added = 2;
  EXPECT_EQ(hear(added(3, page, 1), good, {5}), errc::protocol_violation) << "more regions than there may be";
}

TEST_F(RailProtocolRegions, RemovalsThatThePeerDoesNotTakeAnswersToAreBounded) {
  Side side(1, 2 * max_queued_answers);
  side.join(b);
  MessageHeader removal;
  removal.type = MessageType::region_removed;
  removal.operation = 1;
  std::size_t taken = 0;
  std::error_code ec;
  while (!ec && taken < 2 * max_queued_answers) {
    ec = side.protocol->received(std::as_bytes(std::span(&removal, 1)));
    taken += ec ? 0U : 1U;
  }
  EXPECT_EQ(ec, errc::protocol_violation);
  EXPECT_EQ(taken, max_queued_answers);
}

}  // namespace
}  // namespace kvferry::rdma::testing
