// SPDX-License-Identifier: Apache-2.0
// What a rail keeps account of: whose turn it is, what is under way, which objects have arrived, what was refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/two_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

class RailProtocolAccounts : public TwoSides {
 protected:
  RailProtocolAccounts() : TwoSides(128) {}

  /// Until neither side has anything to do.
  void run() { (void)move(); }

  using Batch = std::shared_ptr<kit::StripedOperation>;

  /// Starts the first of a notified write's two parts; the other one is another rail's.
  static std::pair<Batch, std::shared_ptr<Outcome>> start_first_of_two(Side& from) {
    const auto outcome = std::make_shared<Outcome>();
    auto request = write_of(from, 0, 2);
    request.notification.resize(3);
    auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([outcome](std::error_code ec, std::size_t count) {
          ++outcome->calls;
          outcome->ec = ec;
          outcome->count = count;
        }),
        kit::Clock::now() + std::chrono::hours(1), from.registry);
    EXPECT_FALSE(from.registry->add(operation));
    operation->start_on(from.link);
    const auto batch = std::make_shared<kit::StripedOperation>(operation, 2);
    from.protocol->start(batch, {0, 1}, from.prepared());
    return {batch, outcome};
  }

  [[nodiscard]] static TransferRequest write_of(Side& side, std::size_t first_page, std::size_t pages) {
    TransferRequest request = one_sided(TransferKind::write, {}, {});
    for (std::size_t i = 0; i < pages; ++i) {
      request.objects.push_back(side.at((first_page + i) * page, page));
      // Scattered at the peer: a request for each page.
      request.remote_indexes.push_back(first_page + (i * 7 + 3) % pages);
    }
    return request;
  }
};

TEST_F(RailProtocolAccounts, LongOperationsTakeTurns) {
  const std::array outcomes{std::make_shared<Outcome>(), std::make_shared<Outcome>()};
  a.start(write_of(a, 0, 40), outcomes[0]);
  a.start(write_of(a, 40, 40), outcomes[1]);
  ASSERT_TRUE(post(a, b));
  ASSERT_EQ(list_->size(), queue_depth / 4) << "a quarter of the queue, so that others are under way beside it";
  const std::uint64_t first = (*list_)[0].wr_id;
  a.protocol->completed();
  ASSERT_TRUE(post(a, b));
  EXPECT_NE((*list_)[0].wr_id, first);
  a.protocol->completed();
  ASSERT_TRUE(post(a, b));
  EXPECT_EQ((*list_)[0].wr_id, first);
  a.protocol->completed();
  run();
  EXPECT_EQ(outcomes[0]->count, 40U);
  EXPECT_EQ(outcomes[1]->count, 40U);
}

TEST_F(RailProtocolAccounts, ListsAreUnderWayUntilTheLastRequestIsPosted) {
  // The first two are bounded by the queue's places, the last by the window's bytes.
  for (const auto& [kind, bytes, depth] :
       {std::tuple{TransferKind::write, page, queue_depth}, std::tuple{TransferKind::read, page, queue_depth},
        std::tuple{TransferKind::write, 256 * page, std::size_t{256}}}) {
    constexpr std::size_t objects = 64;
    Side from(objects * bytes / page, buffers);
    Side to(objects * bytes / page, buffers);
    for (const auto& [side, peer] : {std::pair{&from, &to}, std::pair{&to, &from}}) {
      side->depth = depth;
      side->request_bytes = bytes;
      side->join(*peer);
    }
    TransferRequest request = one_sided(kind, {}, {});
    for (std::size_t i = 0; i < objects; ++i) {
      request.objects.push_back(from.at(i * bytes, bytes));
      request.remote_ranges.push_back({0, (objects - 1 - i) * bytes, bytes});
    }
    const auto outcome = std::make_shared<Outcome>();
    from.start(std::move(request), outcome);
    std::size_t lists = 0;
    std::size_t requests = 0;
    while (requests < objects) {
      while (post(from, to)) {
        ++lists;
        requests += list_->size();
      }
      if (requests < objects) {
        ASSERT_GE(lists, 3U) << requests << " of " << objects << " requests of " << bytes << " bytes";
      }
      const bool more = requests < objects;
      from.protocol->completed();
      --lists;
      EXPECT_EQ(from.protocol->work_waits(), more);
      EXPECT_GE(from.protocol->window_used(), 0.5) << "a list is a quarter of what may be under way";
      EXPECT_LT(from.protocol->window_used(), 1);
    }
    for (; lists > 0; --lists) {
      from.protocol->completed();
    }
    EXPECT_FALSE(from.protocol->work_waits());
    EXPECT_EQ(from.protocol->window_used(), 0);
    EXPECT_EQ(outcome->count, objects);
  }
}

TEST_F(RailProtocolAccounts, NothingIsOwedWhenAnOperationHasEnded) {
  for (const bool given_up : {false, true}) {
    const auto outcome = std::make_shared<Outcome>();
    EXPECT_TRUE(a.protocol->settled());
    const auto operation = a.start(write_of(a, 0, 40), outcome);
    ASSERT_TRUE(post(a, b));
    EXPECT_FALSE(a.protocol->settled());
    if (given_up) {
      operation->request_stop(errc::cancelled);
      EXPECT_TRUE(a.protocol->draining_since().has_value());
    }
    a.protocol->completed();
    run();
    EXPECT_EQ(outcome->calls, 1);
    EXPECT_FALSE(a.protocol->draining_since().has_value());
    EXPECT_TRUE(a.protocol->settled());
  }
}

TEST_F(RailProtocolAccounts, OnlyWhatHasWaitedForSoLongIsCutOff) {
  const auto running = std::make_shared<Outcome>();
  const auto stopped = std::make_shared<Outcome>();
  a.start(write_of(a, 0, 1), running);
  const auto operation = a.start(write_of(a, 1, 1), stopped);
  ASSERT_TRUE(post(a, b));
  EXPECT_FALSE(a.protocol->cut_off(kit::Clock::now())) << "neither was stopped";
  operation->request_stop(errc::cancelled);
  EXPECT_FALSE(a.protocol->cut_off(kit::Clock::now() - std::chrono::hours(1)));
  EXPECT_TRUE(a.protocol->cut_off(kit::Clock::now()));
  EXPECT_EQ(running->calls, 0);
}

TEST_F(RailProtocolAccounts, ASendThatIsStoppedWhileItsBytesAreUnderWayMayLand) {
  std::vector<MutableBuffer> objects;
  std::vector<MutableBuffer> targets;
  for (std::size_t i = 0; i < 2 * queue_depth; ++i) {
    objects.push_back(a.at(2 * i * page, page));
    targets.push_back(b.at(2 * i * page, page));
  }
  b.start(paired(TransferKind::recv, targets, 1), std::make_shared<Outcome>());
  while (post(b, a)) {
    b.protocol->completed();
    receive_all(a);
  }
  const auto sent = std::make_shared<Outcome>();
  const auto send = a.start(paired(TransferKind::send, objects, 1), sent);
  ASSERT_TRUE(post(a, b));
  send->request_stop(errc::cancelled);
  EXPECT_EQ(sent->calls, 0);
  a.protocol->fail(errc::connection_lost, "the test says so");
  EXPECT_EQ(sent->calls, 1);
  EXPECT_EQ(sent->ec, errc::cancelled_in_flight);
}

TEST_F(RailProtocolAccounts, ASendThatLosesARecvThatWasTooSmallFitsTheNextOne) {
  const auto recv = b.start(paired(TransferKind::recv, {b.at(0, 10)}, 1), std::make_shared<Outcome>());
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  a.start(paired(TransferKind::send, {a.at(0, 100)}, 1), sent);
  recv->request_stop(errc::cancelled);
  ASSERT_TRUE(post(b, a));
  b.protocol->completed();
  receive_all(a);
  b.start(paired(TransferKind::recv, {b.at(0, 100)}, 1), received);
  run();
  EXPECT_EQ(sent->calls, 1);
  EXPECT_FALSE(sent->ec) << sent->ec.message();
  EXPECT_EQ(sent->count, 1U);
  EXPECT_EQ(received->count, 1U);
}

TEST_F(RailProtocolAccounts, BothSidesKnowWhichObjectDidNotFit) {
  const auto sent = std::make_shared<Outcome>();
  const auto received = std::make_shared<Outcome>();
  std::array<std::error_code, 3> send_statuses;
  std::array<std::error_code, 3> recv_statuses;
  auto recv = paired(TransferKind::recv, {b.at(0, 100), b.at(page, 10), b.at(2 * page, 100)}, 1);
  recv.statuses = recv_statuses;
  b.start(std::move(recv), received);
  auto send = paired(TransferKind::send, {a.at(0, 100), a.at(page, 100), a.at(2 * page, 100)}, 1);
  send.statuses = send_statuses;
  a.start(std::move(send), sent);
  run();
  for (const auto& outcome : {sent, received}) {
    EXPECT_EQ(outcome->ec, errc::buffer_too_small);
    EXPECT_EQ(outcome->count, 2U);
  }
  for (const auto& statuses : {send_statuses, recv_statuses}) {
    EXPECT_FALSE(statuses[0]);
    EXPECT_EQ(statuses[1], errc::buffer_too_small);
    EXPECT_FALSE(statuses[2]);
  }
}

TEST_F(RailProtocolAccounts, ARecvIsToldHowManyObjectsItsSendHas) {
  const auto received = std::make_shared<Outcome>();
  std::string diagnostic;
  auto recv = paired(TransferKind::recv, {b.at(0, 100), b.at(page, 100)}, 7);
  recv.diagnostic = &diagnostic;
  b.start(std::move(recv), received);
  a.start(paired(TransferKind::send, {a.at(0, 100)}, 7), std::make_shared<Outcome>());
  run();
  EXPECT_EQ(received->ec, errc::count_mismatch);
  EXPECT_NE(diagnostic.find("tag 7: the recv has 2 objects, the peer's send 1"), std::string::npos) << diagnostic;
}

TEST_F(RailProtocolAccounts, RecvsThatWaitForTheirSendsAreBounded) {
  std::vector<std::byte> message;
  std::uint64_t recv = 0;
  const auto post_recv = [&](std::size_t count) {
    MessageHeader header;
    header.type = MessageType::recv_post;
    header.operation = ++recv;
    header.count = header.total = static_cast<std::uint32_t>(count);
    header.body_bytes = static_cast<std::uint32_t>(count * sizeof(PostedBuffer));
    header.flags = MessageHeader::last;
    message.resize(sizeof(header) + header.body_bytes);
    std::memcpy(message.data(), &header, sizeof(header));
    return a.protocol->received(message);
  };
  EXPECT_FALSE(post_recv(kit::max_paired_objects));
  EXPECT_FALSE(post_recv(kit::max_paired_objects - 48));  // with what each recv adds, that is all there is room for
  EXPECT_FALSE(post(a, b)) << "neither is refused";
  EXPECT_FALSE(post_recv(1));
  ASSERT_TRUE(post(a, b));
  MessageHeader refusal;
  std::memcpy(&refusal, b.arrived.back().data(), sizeof(refusal));
  EXPECT_EQ(refusal.type, MessageType::send_abort);
  EXPECT_EQ(refusal.operation, recv);
  EXPECT_EQ(refusal.status, static_cast<std::uint32_t>(errc::resource_limit));
  EXPECT_EQ(post_recv(kit::max_paired_objects + 1), errc::protocol_violation);
}

/// The messages of a hostile peer that sends what comes in several, part by part.
class RailProtocolParts : public RailProtocolAccounts {
 protected:
  RailProtocolParts() {
    a.own_buffers = max_messages;  // it need not take the answers
    a.join(b);
  }

  std::error_code receive(MessageHeader header, std::size_t body) {
    header.body_bytes = static_cast<std::uint32_t>(body);
    std::vector<std::byte> message(sizeof(header) + body);
    std::memcpy(message.data(), &header, sizeof(header));
    return a.protocol->received(message);
  }
  std::error_code recv_part(std::uint64_t recv, std::size_t first, std::size_t count, std::size_t total) {
    MessageHeader header;
    header.type = MessageType::recv_post;
    header.operation = recv;
    header.first = static_cast<std::uint32_t>(first);
    header.count = static_cast<std::uint32_t>(count);
    header.total = static_cast<std::uint32_t>(total);
    header.flags = first + count == total ? MessageHeader::last : 0;
    return receive(header, count * sizeof(PostedBuffer));
  }
  std::error_code notification_part(std::size_t first, std::size_t size, std::size_t total) {
    MessageHeader header;
    header.type = MessageType::notify;
    header.operation = 1;
    header.first = static_cast<std::uint32_t>(first);
    header.total = static_cast<std::uint32_t>(total);
    header.flags = first + size == total ? MessageHeader::last : 0;
    return receive(header, size);
  }
  [[nodiscard]] std::optional<kit::Clock::time_point> since() const { return a.protocol->unfinished_since(); }
};

TEST_F(RailProtocolParts, TimeRunsWhileAPeerIsWithinARecvsList) {
  EXPECT_EQ(since(), std::nullopt);
  ASSERT_FALSE(recv_part(1, 0, 10, 10));
  EXPECT_EQ(since(), std::nullopt) << "it came whole";
  const auto before = kit::Clock::now();
  ASSERT_FALSE(recv_part(2, 0, 10, 100'000));
  const auto began = since();
  ASSERT_TRUE(began);
  EXPECT_GE(*began, before);
  std::size_t sent = 10;
  for (; (sent + 10) * sizeof(PostedBuffer) < PartsClock::least_progress; sent += 10) {
    ASSERT_FALSE(recv_part(2, sent, 10, 100'000));
    EXPECT_EQ(since(), began) << "a few bytes are no progress";
  }
  for (int i = 0; i < 2; ++i, sent += 10) {
    ASSERT_FALSE(recv_part(2, sent, 10, 100'000));
  }
  EXPECT_GT(since(), began) << "64 KiB are";
  ASSERT_FALSE(recv_part(2, sent, 100'000 - sent, 100'000));
  EXPECT_EQ(since(), std::nullopt);
}

TEST_F(RailProtocolParts, TimeEndsWithTheRecvOrWithAnotherOne) {
  ASSERT_FALSE(recv_part(1, 0, 10, 20));
  MessageHeader cancel;
  cancel.type = MessageType::recv_cancel;
  cancel.operation = 1;
  ASSERT_FALSE(receive(cancel, 0));
  EXPECT_EQ(since(), std::nullopt);
  ASSERT_FALSE(recv_part(2, 0, 10, 20));
  const auto of_second = since();
  ASSERT_FALSE(recv_part(3, 0, 10, 20));
  EXPECT_GT(since(), of_second);
}

TEST_F(RailProtocolParts, TimeRunsWhileAPeerIsWithinANotification) {
  ASSERT_FALSE(notification_part(0, 100, 100));
  EXPECT_EQ(since(), std::nullopt);
  ASSERT_FALSE(notification_part(0, 100, 300));
  const auto began = since();
  ASSERT_TRUE(began);
  ASSERT_FALSE(recv_part(1, 0, 10, 20));
  EXPECT_EQ(since(), began) << "of the older of the two";
  ASSERT_FALSE(notification_part(100, 200, 300));
  EXPECT_GT(since(), began);
  ASSERT_FALSE(recv_part(1, 10, 10, 20));
  EXPECT_EQ(since(), std::nullopt);
}

TEST_F(RailProtocolAccounts, ANotificationIsSentWhenAllRailsHaveMovedTheirPart) {
  for (const bool other_part_is_first : {false, true}) {
    for (const std::uint32_t status : {std::uint32_t{0}, static_cast<std::uint32_t>(errc::resource_limit), 7777U}) {
      Side from(64, buffers);
      from.join(b);
      const auto [batch, outcome] = start_first_of_two(from);
      const auto& operation = batch->operation();
      ASSERT_TRUE(post(from, b));
      if (other_part_is_first) {
        operation->landed(1, 1);
        EXPECT_FALSE(batch->part_done({}, {}));
      }
      from.protocol->completed();
      ASSERT_EQ(outcome->calls, 0);
      EXPECT_FALSE(post(from, b)) << "that the peer's adapter has the bytes doesn't say that they are in memory";
      ASSERT_EQ(b.arrived.size(), 1U) << "behind the bytes";
      receive_all(b);
      ASSERT_TRUE(post(b, from));
      b.protocol->completed();
      receive_all(from);
      ASSERT_EQ(outcome->calls, 0);
      if (!other_part_is_first) {
        operation->landed(1, 1);
        EXPECT_TRUE(batch->part_done({}, {})) << "the other rail sends it";
        EXPECT_FALSE(post(from, b));
        operation->finish({});
        continue;
      }
      ASSERT_TRUE(post(from, b));
      EXPECT_EQ(outcome->calls, 0) << "the peer has not answered";
      MessageHeader ack;
      std::memcpy(&ack, b.arrived.back().data(), sizeof(ack));
      ASSERT_EQ(ack.type, MessageType::notify);
      b.arrived.clear();
      ack.type = MessageType::notify_ack;
      ack.body_bytes = 0;
      ack.credits = 0;
      ack.status = status;
      EXPECT_FALSE(from.protocol->received(std::as_bytes(std::span(&ack, 1)))) << from.protocol->violation();
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_EQ(outcome->count, 2U);
      // A status that there is not is no success.
      const errc failure = status == 7777 ? errc::protocol_violation : errc::resource_limit;
      EXPECT_EQ(outcome->ec, status == 0 ? std::error_code() : std::error_code(failure));
    }
  }
}

TEST_F(RailProtocolAccounts, APartOfANotifiedWriteThatIsGivenUpWaitsForNoAnswer) {
  const auto [batch, outcome] = start_first_of_two(a);
  const auto& operation = batch->operation();
  ASSERT_TRUE(post(a, b));
  a.protocol->completed();
  operation->request_stop(errc::cancelled);
  EXPECT_TRUE(a.protocol->idle());
  (void)batch->part_done(errc::cancelled, {});
  EXPECT_EQ(outcome->ec, errc::cancelled);
  run();
  receive_all(b);
  run();
  EXPECT_TRUE(b.host->notifications.empty());
}

TEST_F(RailProtocolAccounts, APeerThatSendsMoreThanThereAreBuffersForIsAViolation) {
  MessageHeader credit;
  credit.type = MessageType::credit;
  const auto receive = [&] { return a.protocol->received(std::as_bytes(std::span(&credit, 1))); };
  for (std::size_t i = 0; i < buffers; ++i) {
    ASSERT_FALSE(receive()) << a.protocol->violation();
  }
  // Told that they have been posted anew, it has as many again.
  ASSERT_TRUE(post(a, b));
  for (std::size_t i = 0; i < buffers; ++i) {
    ASSERT_FALSE(receive()) << a.protocol->violation();
  }
  EXPECT_EQ(receive(), errc::protocol_violation);
  EXPECT_NE(a.protocol->violation().find("8 receive buffers"), std::string::npos) << a.protocol->violation();
}

TEST_F(RailProtocolAccounts, ShortMessagesGoOutWithTheirRequest) {
  for (const std::size_t max_inline : {sizeof(MessageHeader) - 1, sizeof(MessageHeader)}) {
    RailTerms terms;
    terms.peer_buffers = terms.peer_buffers_at_first = buffers;
    terms.own_buffers = terms.own_buffers_at_first = buffers;
    terms.queue_depth = queue_depth;
    terms.max_inline = max_inline;
    a.protocol.emplace(a.host, a.link_regions, 0, MessageSlots{a.slots.data(), slot_count, small_message, 2}, terms, a.look);
    ASSERT_TRUE(a.protocol->fill_message(*list_, MessageType::credit, 0, 0));
    EXPECT_EQ(((*list_)[0].send_flags & IBV_SEND_INLINE) != 0, max_inline == sizeof(MessageHeader));
    EXPECT_EQ(list_->bytes_written, sizeof(MessageHeader));
  }
}

TEST_F(RailProtocolAccounts, TheFirstMessageOfAConnectionSaysWhoIsThere) {
  MessageHeader hello;
  hello.type = MessageType::hello;
  hello.operation = 4711;
  hello.tag = 1;
  const auto greeted = [&](auto change, std::size_t bytes = sizeof(MessageHeader)) {
    MessageHeader changed = hello;
    change(changed);
    Side side(1, buffers);
    side.join(b);
    return side.protocol->greeted(std::as_bytes(std::span(&changed, 1)).first(bytes), MessageType::hello, 4711, 1);
  };
  EXPECT_TRUE(greeted([](MessageHeader&) {}));
  EXPECT_FALSE(greeted([](MessageHeader&) {}, sizeof(MessageHeader) - 1));
  EXPECT_FALSE(greeted([](MessageHeader& header) { header.magic ^= 1; }));
  EXPECT_FALSE(greeted([](MessageHeader& header) { header.type = MessageType::welcome; }));
  EXPECT_FALSE(greeted([](MessageHeader& header) { header.operation ^= 1; }));
  EXPECT_FALSE(greeted([](MessageHeader& header) { header.tag = 0; }));
  EXPECT_FALSE(greeted([](MessageHeader& header) { header.body_bytes = 1; }));
}

}  // namespace
}  // namespace kvferry::rdma::testing
