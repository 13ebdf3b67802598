// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/use_future.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/mapped_memory.hpp>
#include <kvferry/testing/stalled_peer.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Regions that come and go while there are peers and traffic.
class RegionsTests : public StalledPeerBase {
 protected:
  static constexpr std::size_t page = 4096;
  static constexpr std::chrono::milliseconds soon{50};

  /// A write, or else a read, of `b`'s pages in a region.
  [[nodiscard]] std::shared_ptr<Transfer> access(Node& a, const Node& b, const Objects& objects, std::uint32_t region) {
    const auto indexes = consecutive(0, objects.count());
    return start(capabilities().write ? TransferKind::write : TransferKind::read, a, b, objects, at(indexes, region));
  }

  [[nodiscard]] static std::vector<std::uint32_t> numbers_of(const std::vector<LocalRegion>& regions) {
    std::vector<std::uint32_t> numbers;
    for (const LocalRegion& region : regions) {
      numbers.push_back(region.number);
    }
    return numbers;
  }

  /// Writes, from a thread of its own, to pages of a region until a write fails.
  class Writer {
   public:
    Writer(Node& from, const Node& to, std::uint32_t region, std::uint64_t first_page, const Objects& objects)
        : from_(from),
          to_(to.id()),
          region_(region),
          objects_(objects),
          indexes_(consecutive(first_page, objects.count())) {
      thread_ = std::thread([this] { write(); });
    }
    Writer(const Writer&) = delete;
    Writer& operator=(const Writer&) = delete;
    ~Writer() { (void)stop(); }

    /// @return how the last write ended.
    std::error_code join() {
      if (thread_.joinable()) {
        thread_.join();
      }
      return error_;
    }
    std::error_code stop() {
      stopped_ = true;
      return join();
    }
    /// Waits for so many more writes.
    [[nodiscard]] bool goes_on(std::size_t writes, std::chrono::milliseconds limit) const {
      const std::size_t wanted = written_ + writes;
      const auto until = std::chrono::steady_clock::now() + limit;
      while (written_ < wanted && std::chrono::steady_clock::now() < until) {
        std::this_thread::yield();
      }
      return written_ >= wanted;
    }

   private:
    void write() {
      TransferSpec spec = at(indexes_, region_);
      spec.peer_id = to_;
      while (!error_ && !stopped_) {
        (void)from_->batched_write(objects_.readable(), spec, error_);
        written_ += error_ ? 0 : 1;
      }
    }

    Node& from_;
    const std::string to_;
    const std::uint32_t region_;
    const Objects& objects_;
    const std::vector<std::uint64_t> indexes_;
    std::error_code error_;
    std::atomic<std::size_t> written_{0};
    std::atomic<bool> stopped_{false};
    std::thread thread_;
  };

 public:
  void ANewRegionIsUsedByPeersAtOnce() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto [a, b] = connected_pair();
    const auto given = static_cast<std::uint32_t>(b->regions().size());
    const Objects objects = a.objects(2, page).fill(1);
    std::vector<std::unique_ptr<MappedMemory>> memory;
    for (std::uint32_t i = 0; i < 20; ++i) {
      memory.push_back(std::make_unique<MappedMemory>(4, page));
      const std::uint32_t number = b->add_region(memory.back()->region());
      EXPECT_EQ(number, given + i);
      // The number comes by another road than the news of it.
      const auto transfer = access(a, b, objects, number);
      ASSERT_EQ(transfer->outcome(), done(2)) << transfer->diagnostic();
      if (capabilities().write) {
        EXPECT_TRUE(matches(memory.back()->page(0), 1));
        EXPECT_TRUE(matches(memory.back()->page(1), 2));
      }
    }
    EXPECT_EQ(access(a, b, objects, given + 20)->outcome(), failed(errc::unknown_region));
    b.destroy_channel();  // before the memory
  }

  /// Numbers of regions that either side has added later mean nothing to the other.
  void PageSizesOfRegionsThatWereAddedLaterMayDiffer() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    NodeSpec spec;
    spec.options.require_equal_page_sizes = true;
    const auto [a, b] = connected_pair(spec, spec);
    const MappedMemory own(4, page);
    const MappedMemory far(4, 4 * page);
    const std::uint32_t number = a->add_region(own.region());
    ASSERT_EQ(b->add_region(far.region()), number);
    const Objects objects = a.objects({10}).fill(1);
    const auto transfer = access(a, b, objects, number);
    EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
    // Nor does it matter whether the peer was told by the handshake.
    a->disconnect(b.id());
    connect(a, b);
    EXPECT_EQ(access(a, b, objects, number)->outcome(), done(1));
    a.destroy_channel();
    b.destroy_channel();
  }

  void ANotificationIsBehindTheNewsOfARegion() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    const MappedMemory memory(4, page);
    const std::uint32_t number = b->add_region(memory.region(Access::read));
    const auto told = start_receive_notification(a);
    b->notify(a.id(), std::vector<std::byte>{static_cast<std::byte>(number)});
    (void)told->results();
    const auto info = a->peer_info(b.id());
    ASSERT_TRUE(info.has_value());
    const RemoteRegion* const found = find_region(info->regions, number);
    ASSERT_NE(found, nullptr);
    EXPECT_EQ(*found, (RemoteRegion{4 * page, page, Access::read, number}));
    if (capabilities().write) {
      EXPECT_EQ(access(a, b, a.objects({10}), number)->outcome(), failed(errc::access_denied));
    }
    b.destroy_channel();
  }

  void AHandshakeTellsOfTheRegionsThatThereAre() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto nodes = pair();
    const auto given = static_cast<std::uint32_t>(nodes.b->regions().size());
    const MappedMemory first(2, page);
    const MappedMemory second(3, page);
    for (Node* const node : {&nodes.a, &nodes.b}) {
      EXPECT_EQ((*node)->add_region(first.region()), given);
      EXPECT_EQ((*node)->add_region(second.region(Access::write)), given + 1);
      EXPECT_EQ((*node)->add_region(first.region()), given + 2);
      (*node)->remove_region(given);
      (*node)->remove_region(given + 2);
      const auto left = numbers_of((*node)->regions());
      ASSERT_EQ(left.size(), given + 1);
      EXPECT_EQ(left.back(), given + 1);
    }
    connect(nodes.a, nodes.b);
    const Objects objects = nodes.a.objects({10});
    for (const auto& [node, peer] : {std::pair(&nodes.a, &nodes.b), std::pair(&nodes.b, &nodes.a)}) {
      const auto info = (*node)->peer_info(peer->id());
      ASSERT_TRUE(info.has_value());
      ASSERT_EQ(info->regions.size(), given + 1);
      EXPECT_EQ(info->regions.back(), (RemoteRegion{3 * page, page, Access::write, given + 1}));
    }
    if (capabilities().write) {
      const auto write = start(TransferKind::write, nodes.a, nodes.b, objects, without_checksums(at({0}, given + 1)));
      EXPECT_EQ(write->outcome(), done(1)) << write->diagnostic();
    }
    EXPECT_EQ(access(nodes.a, nodes.b, objects, given)->outcome(), failed(errc::region_gone));
    EXPECT_EQ(access(nodes.a, nodes.b, objects, given + 2)->outcome(), failed(errc::region_gone));
    EXPECT_EQ(access(nodes.a, nodes.b, objects, given + 3)->outcome(), failed(errc::unknown_region));
    nodes.a.destroy_channel();
    nodes.b.destroy_channel();
  }

  void WhatIsRemovedIsGone() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto [a, b] = connected_pair();
    MappedMemory memory(4, page);
    const std::uint32_t number = b->add_region(memory.region());
    const Objects objects = a.objects({page, 10}).fill(3);
    ASSERT_EQ(access(a, b, objects, number)->outcome(), done(2));
    b->remove_region(number);
    memory.unmap();
    const auto too_late = access(a, b, objects, number);
    EXPECT_EQ(too_late->outcome(), failed(errc::region_gone)) << too_late->diagnostic();
    if (capabilities().ranges) {
      TransferSpec spec;
      const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 0, page),
                                            RemoteRange::contiguous(number, 0, 10)};
      spec.remote_ranges = ranges;
      const auto kind = capabilities().write ? TransferKind::write : TransferKind::read;
      EXPECT_EQ(start(kind, a, b, objects, spec)->outcome(), failed(errc::region_gone));
    }
    EXPECT_EQ(find_region(a->peer_info(b.id())->regions, number), nullptr);
    EXPECT_EQ(find_region(b->regions(), number), nullptr);
    MappedMemory other(1, page);
    EXPECT_EQ(b->add_region(other.region()), number + 1) << "the number stays taken";
    // Also one that was given at the beginning, while another is in use.
    b->remove_region(0);
    EXPECT_EQ(access(a, b, a.objects({10}), 0)->outcome(), failed(errc::region_gone));
    EXPECT_EQ(access(a, b, a.objects({10}), number + 1)->outcome(), done(1));
    b.destroy_channel();
  }

  void SenselessCallsAreRefused() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    Node& node = add_node();
    MappedMemory memory(2, page);
    const auto given = static_cast<std::uint32_t>(node->regions().size());
    std::error_code error;
    MemoryRegion wrong = memory.region();
    wrong.page_size = page - 1;
    EXPECT_EQ(node->add_region(wrong, error), 0U);
    EXPECT_EQ(error, errc::invalid_region);
    EXPECT_THROW(node->add_region({}), TransferError);
    wrong = memory.region();
    wrong.peer_access = static_cast<Access>(4);  // peers would refuse all of the channel's regions for it
    EXPECT_EQ(node->add_region(wrong, error), 0U);
    EXPECT_EQ(error, errc::invalid_region);
    node->remove_region(given, {}, error);
    EXPECT_EQ(error, errc::unknown_region);
    EXPECT_THROW(node->remove_region(given), TransferError);
    EXPECT_EQ(node->add_region(memory.region(), error), given) << "what was refused has no number";
    EXPECT_FALSE(error) << error.message();
    node->remove_region(given, {}, error);
    EXPECT_FALSE(error) << error.message();
    node->remove_region(given, {}, error);
    EXPECT_EQ(error, errc::region_gone);
    node->close();
    EXPECT_EQ(node->add_region(memory.region(), error), 0U);
    EXPECT_EQ(error, errc::closed);
    node->remove_region(0, {}, error);
    EXPECT_EQ(error, errc::closed);
  }

  void MemoryIsUnmappedUnderTraffic() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair({.local_bytes = 1024 * 1024});
    const Objects objects = a.objects(16, page).fill(5);
    const Objects others = a.objects(8, page).fill(500);
    const Objects back = a.objects(4, page);
    for (int round = 0; round < 5; ++round) {
      MappedMemory memory(36, page);
      const std::uint32_t number = b->add_region(memory.region());
      Writer bystander(a, b, 0, 0, others);
      Writer first(a, b, number, 0, objects);
      Writer second(a, b, number, 16, objects);
      EXPECT_TRUE(first.goes_on(2, limit()));
      EXPECT_TRUE(second.goes_on(2, limit()));
      std::shared_ptr<Transfer> read;
      if (capabilities().read) {
        read = start(TransferKind::read, a, b, back, at({32, 33, 34, 35}, number));
      }
      std::error_code error;
      b->remove_region(number, limit(), error);
      ASSERT_FALSE(error) << error.message();
      memory.unmap();
      EXPECT_EQ(first.join(), errc::region_gone);
      EXPECT_EQ(second.join(), errc::region_gone);
      if (read) {
        const Outcome outcome = read->outcome();
        EXPECT_TRUE(outcome == done(4) || outcome.error == errc::region_gone) << outcome;
      }
      EXPECT_TRUE(bystander.goes_on(2, limit())) << "another region's traffic does not go on";
      EXPECT_FALSE(bystander.stop());
      for (std::size_t i = 0; i < others.count(); ++i) {
        EXPECT_TRUE(matches(b.page(i), 500 + i));
        fill_constant(b.page(i), background);
      }
    }
    expect_usable(a, b);
  }

  void OperationsOfItsOwnAreWaitedForAndThenCancelled() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    MappedMemory memory(8, page);
    const std::uint32_t number = b->add_region(memory.region(Access::none));
    const std::size_t size = Objects::footprint(std::vector<std::size_t>{1000});
    const std::vector<std::size_t> sizes{1000};
    const Objects met(memory.whole().first(size), sizes);
    const Objects unmet(memory.whole().subspan(4 * page, size), sizes);
    const auto waits = start(TransferKind::recv, b, a, met, tagged(1));
    auto removal = b->async_remove_region(number, limit(), asio::use_future);
    EXPECT_EQ(removal.wait_for(soon), std::future_status::timeout) << "a recv into the region is under way";
    ASSERT_EQ(start(TransferKind::send, a, b, a.objects({1000}).fill(9), tagged(1))->outcome(), done(1));
    EXPECT_NO_THROW(in_time(removal));
    EXPECT_EQ(waits->outcome(), done(1));
    EXPECT_TRUE(met.match(9));
    for (auto time = soon;; time *= 2) {
      const std::uint32_t again = b->add_region(memory.region(Access::none));
      const auto never = start(TransferKind::recv, b, a, unmet, tagged(2));
      std::error_code error;
      b->remove_region(again, time, error);
      EXPECT_FALSE(error) << error.message();
      const Outcome ended = never->outcome();
      if (b->remote_xfer_handler_exists(a.id()) || time > limit()) {
        EXPECT_EQ(ended, failed(errc::cancelled));
        break;
      }
      // Within that time the peer didn't even say that it has forgotten the region: the connection has ended first.
      EXPECT_TRUE(ended == failed(errc::cancelled) || ended.error == condition::peer_failed) << ended;
      connect_again(a, b);
    }
    memory.unmap();
    connect(a, b);
    expect_usable(a, b);
    b.destroy_channel();
  }

  void APeerThatDoesNotAnswerIsNotWaitedForLonger() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto nodes = pair_with_pausable_peer();
    MappedMemory memory(4, page);
    const std::uint32_t number = nodes.a->add_region(memory.region());
    nodes.b.pause(limit());
    std::error_code error;
    nodes.a->remove_region(number, soon, error);
    EXPECT_FALSE(error) << error.message();
    EXPECT_FALSE(nodes.a->remote_xfer_handler_exists(nodes.b.id())) << "the peer can touch the memory still";
    memory.unmap();
    nodes.b.resume();
    connect(nodes.a, nodes.b);
    expect_usable(nodes.a, nodes.b);
  }

  void ACancelledCallEndsOnlyTheWait() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto nodes = pair_with_pausable_peer();
    const MappedMemory memory(4, page);
    const std::uint32_t number = nodes.a->add_region(memory.region());
    nodes.b.pause(limit());
    asio::cancellation_signal signal;
    std::promise<std::error_code> ended;
    nodes.a->async_remove_region(
        number, limit(), asio::bind_cancellation_slot(signal.slot(), [&](std::error_code ec) { ended.set_value(ec); }));
    auto joined = nodes.a->async_remove_region(number, limit(), asio::use_future);
    signal.emit(asio::cancellation_type::terminal);
    const std::error_code cause = in_time(ended.get_future());
    EXPECT_TRUE(cause == errc::cancelled || !cause) << cause.message();
    EXPECT_EQ(find_region(nodes.a->regions(), number), nullptr);
    nodes.b.resume();
    EXPECT_NO_THROW(in_time(joined));
    std::error_code error;
    nodes.a->remove_region(number, {}, error);
    EXPECT_EQ(error, errc::region_gone);
    nodes.a.destroy_channel();
  }

  void AClosedChannelEndsARemoval() {
    KVFERRY_TESTING_REQUIRE(region_changes);
    const auto nodes = pair_with_pausable_peer();
    MappedMemory memory(4, page);
    const std::uint32_t number = nodes.a->add_region(memory.region());
    nodes.b.pause(limit());
    std::promise<std::error_code> ended;
    nodes.a->async_remove_region(number, limit(), [&](std::error_code ec) { ended.set_value(ec); });
    nodes.a->close();
    memory.unmap();
    const std::error_code cause = in_time(ended.get_future());
    EXPECT_TRUE(!cause || cause == errc::closed) << cause.message();
  }

  void WhereThereAreNoneTheyAreRefused() {
    Node& node = add_node();
    if (capabilities().region_changes) {
      return;  // the other tests are for that
    }
    const MappedMemory memory(1, page);
    std::error_code error;
    EXPECT_EQ(node->add_region(memory.region(), error), 0U);
    EXPECT_EQ(error, errc::not_supported);
    node->remove_region(0, {}, error);
    EXPECT_EQ(error, errc::not_supported);
    EXPECT_FALSE(node->regions().empty());
  }
};

KVFERRY_TESTING_SUITE(Regions, RegionsTests, ANewRegionIsUsedByPeersAtOnce,
                      PageSizesOfRegionsThatWereAddedLaterMayDiffer, ANotificationIsBehindTheNewsOfARegion,
                      AHandshakeTellsOfTheRegionsThatThereAre, WhatIsRemovedIsGone, SenselessCallsAreRefused,
                      MemoryIsUnmappedUnderTraffic, OperationsOfItsOwnAreWaitedForAndThenCancelled,
                      APeerThatDoesNotAnswerIsNotWaitedForLonger, ACancelledCallEndsOnlyTheWait,
                      AClosedChannelEndsARemoval, WhereThereAreNoneTheyAreRefused);

}  // namespace kvferry::testing
