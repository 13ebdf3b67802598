// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <poll.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/completion_queue.hpp>
#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Operations that end in a `CompletionQueue`.
class CompletionQueueTests : public ConformanceBase {
 protected:
  [[nodiscard]] static bool readable(const CompletionQueue& queue, Milliseconds patience = Milliseconds(0)) {
    pollfd descriptor{queue.descriptor(), POLLIN, 0};
    return ::poll(&descriptor, 1, static_cast<int>(patience.count())) == 1;
  }

  /// Sleeps on the descriptor until so many entries have come.
  [[nodiscard]] std::vector<CompletionEntry> drain(CompletionQueue& queue, std::size_t count) {
    std::vector<CompletionEntry> entries;
    const auto until = std::chrono::steady_clock::now() + limit();
    while (entries.size() < count && std::chrono::steady_clock::now() < until) {
      std::array<CompletionEntry, 3> some;
      if (readable(queue, limit())) {
        const std::size_t drained = queue.drain(some);
        EXPECT_GT(drained, 0U) << "readable, and nothing is there";
        entries.insert(entries.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(drained));
      }
    }
    EXPECT_EQ(entries.size(), count);
    entries.resize(count);
    return entries;
  }

  [[nodiscard]] CompletionEntry next(CompletionQueue& queue) { return drain(queue, 1).front(); }

  static void expect_success(const CompletionEntry& entry, std::uint64_t user_data, std::size_t count = 0) {
    EXPECT_EQ(entry.user_data, user_data);
    EXPECT_EQ(entry.count, count);
    EXPECT_FALSE(entry.error) << "operation " << user_data << ": " << entry.error.message();
  }

  void expect_two_successes(CompletionQueue& queue) {
    for (const CompletionEntry& entry : drain(queue, 2)) {
      EXPECT_FALSE(entry.error) << "operation " << entry.user_data << ": " << entry.error.message();
    }
  }

  /// A recv that nothing is sent for.
  OperationHandle start_endless(Node& from, const Node& to, const Objects& objects, CompletionQueue& queue,
                                std::uint64_t user_data) {
    TransferSpec spec = tagged(77);
    spec.peer_id = to.id();
    spec.timeout = std::chrono::hours(1);
    return from->async_batched_recv(objects.writable(), spec, queue.token(user_data));
  }

  [[nodiscard]] static std::vector<std::byte> payload() { return {std::byte{1}, std::byte{2}}; }

 public:
  void EveryCallCanEndInIt() {
    const Capabilities can = capabilities();
    CompletionQueue queue;
    const auto [a, b] = pair();
    (void)a->async_lazy_init_peer_connection(a.id(), b.id(), b.url(), {}, {}, queue.token(1));
    expect_success(next(queue), 1);
    PeerEvent event;
    (void)b->async_wait_peer_event({}, queue.token(2, event));
    expect_success(next(queue), 2);
    EXPECT_EQ(event.peer_id, a.id());
    const Objects objects = a.objects({100, 200});
    const std::array<std::uint64_t, 2> pages{1, 2};
    TransferSpec spec = at(pages);
    spec.peer_id = b.id();
    if (can.write) {
      (void)a->async_batched_write(objects.readable(), spec, queue.token(3));
      expect_success(next(queue), 3, 2);
    }
    if (can.read) {
      (void)a->async_batched_read(objects.writable(), spec, queue.token(4));
      expect_success(next(queue), 4, 2);
    }
    if (can.send_recv) {
      TransferSpec to_a = tagged(1);
      to_a.peer_id = a.id();
      TransferSpec to_b = tagged(1);
      to_b.peer_id = b.id();
      const Objects arrival = b.objects({100, 200});
      (void)b->async_batched_recv(arrival.writable(), to_a, queue.token(5));
      (void)a->async_batched_send(objects.readable(), to_b, queue.token(6));
      const auto entries = drain(queue, 2);
      EXPECT_EQ(entries[0].user_data + entries[1].user_data, 11U);
      EXPECT_EQ(entries[0].count + entries[1].count, 4U);
      EXPECT_FALSE(entries[0].error || entries[1].error);
    }
    if (can.notifications) {
      Notification notification;
      std::vector<Notification> notifications;
      (void)b->async_receive_notification({}, queue.token(7, notification));
      (void)a->async_notify(b.id(), payload(), {}, queue.token(8));
      expect_two_successes(queue);
      EXPECT_EQ(notification.payload, payload());
      (void)b->async_receive_notifications(5, 1, {}, queue.token(9, notifications));
      (void)a->async_notify(b.id(), payload(), {.key = 5}, queue.token(10));
      expect_two_successes(queue);
      ASSERT_EQ(notifications.size(), 1U);
    }
    (void)a->async_fence(b.id(), {}, queue.token(11));
    expect_success(next(queue), 11);
    (void)a->async_disconnect(b.id(), queue.token(12));
    expect_success(next(queue), 12);
    PeerInfo info;
    const auto metadata = b->local_metadata(b.id());
    (void)a->async_connect(a.id(), metadata, {}, queue.token(13, info));
    expect_success(next(queue), 13);
    EXPECT_EQ(info.id, b.id());
    std::optional<SideMessage> answer;
    (void)a->async_send_init_side_msg("no url", SideMessage(), {}, queue.token(14, answer));
    EXPECT_EQ(next(queue).error, errc::invalid_url);
    EXPECT_FALSE(answer);
  }

  void TheDescriptorTellsWhetherThereIsSomething() {
    const auto [a, b] = connected_pair();
    CompletionQueue queue;
    std::array<CompletionEntry, 8> entries;
    EXPECT_NE(::fcntl(queue.descriptor(), F_GETFD) & FD_CLOEXEC, 0);
    EXPECT_FALSE(readable(queue));
    EXPECT_EQ(queue.drain(entries), 0U);
    for (std::uint64_t i = 0; i < 5; ++i) {
      (void)a->async_fence("", {}, queue.token(i));
    }
    for (std::uint64_t i = 0; i < 5;) {
      ASSERT_TRUE(readable(queue, limit()));
      EXPECT_EQ(queue.drain(std::span<CompletionEntry>()), 0U);
      const std::size_t count = queue.drain(std::span(entries).first(2));
      for (std::size_t k = 0; k < count; ++k, ++i) {
        EXPECT_EQ(entries[k].user_data, i) << "the oldest first";
        EXPECT_EQ(entries[k].error, errc::empty_peer_id);
      }
    }
    EXPECT_FALSE(readable(queue));
  }

  void AHandleTellsAndCancels() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    CompletionQueue queue;
    const OperationHandle none;
    none.cancel();
    EXPECT_FALSE(none.ended());
    const Objects objects = a.objects({8});
    const OperationHandle handle = start_endless(a, b, objects, queue, 5);
    EXPECT_FALSE(handle.ended());
    EXPECT_FALSE(handle.result());
    handle.cancel();
    const CompletionEntry entry = next(queue);
    EXPECT_EQ(entry.user_data, 5U);
    EXPECT_EQ(entry.error, errc::cancelled);
    ASSERT_TRUE(handle.result());
    EXPECT_EQ(handle.result()->error, errc::cancelled);
    handle.cancel();
    EXPECT_FALSE(readable(queue));
    // Others than transfers are cancelled alike.
    PeerEvent event;
    (void)next_event(a);
    const OperationHandle waiting = a->async_wait_peer_event({}, queue.token(6, event));
    waiting.cancel();
    EXPECT_EQ(next(queue).error, errc::cancelled);
    expect_usable(a, b);
  }

  void ManyThreadsAndOneQueue() {
    KVFERRY_TESTING_REQUIRE(write);
    constexpr std::uint64_t threads = 4;
    constexpr std::uint64_t each = 200;
    // A page for each, as several connections may be writing at a time.
    const auto [a, b] = connected_pair({.local_bytes = 1 << 20}, {.regions = {{threads * each, 4096}}});
    CompletionQueue queue;
    const Objects objects = a.objects({64}).fill(1);
    std::vector<std::jthread> starters;
    for (std::uint64_t t = 0; t < threads; ++t) {
      starters.emplace_back([&, &from = a, id = b.id(), t] {
        for (std::uint64_t i = 0; i < each; ++i) {
          const std::array<std::uint64_t, 1> page{t * each + i};
          TransferSpec spec = at(page);
          spec.peer_id = id;
          (void)from->async_batched_write(objects.readable(), spec, queue.token(t * each + i));
        }
      });
    }
    const auto entries = drain(queue, threads * each);
    starters.clear();
    std::vector<bool> seen(threads * each);
    for (const CompletionEntry& entry : entries) {
      EXPECT_FALSE(entry.error) << entry.error.message();
      ASSERT_LT(entry.user_data, seen.size());
      EXPECT_FALSE(seen[entry.user_data]) << "twice";
      seen[entry.user_data] = true;
    }
    EXPECT_FALSE(readable(queue));
  }

  void MayGoBeforeItsOperationsEnd() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    std::optional<CompletionQueue> queue(std::in_place);
    const Objects objects = a.objects({8});
    const OperationHandle recv = start_endless(a, b, objects, *queue, 1);
    auto event = std::make_unique<PeerEvent>();
    (void)next_event(a);
    const OperationHandle waiting = a->async_wait_peer_event({}, queue->token(2, *event));
    (void)a->async_fence("", {}, queue->token(3));
    queue.reset();
    event.reset();  // nothing is written there any more
    b.destroy_channel();
    const auto until = std::chrono::steady_clock::now() + limit();
    while (!(recv.ended() && waiting.ended()) && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
    ASSERT_TRUE(recv.ended() && waiting.ended());
    EXPECT_TRUE(is(recv.result()->error, condition::peer_failed));
    EXPECT_FALSE(waiting.result()->error);
  }

  void MayGoWhileItsOperationsEnd() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64}).fill(1);
    for (int round = 0; round < 50; ++round) {
      std::vector<OperationHandle> handles;
      {
        CompletionQueue queue;
        for (std::uint64_t i = 0; i < 20; ++i) {
          const std::array<std::uint64_t, 1> page{i};
          TransferSpec spec = at(page);
          spec.peer_id = b.id();
          handles.push_back(a->async_batched_write(objects.readable(), spec, queue.token(i)));
        }
        (void)readable(queue, limit());
      }
      const auto until = std::chrono::steady_clock::now() + limit();
      while (!std::ranges::all_of(handles, &OperationHandle::ended) && std::chrono::steady_clock::now() < until) {
        std::this_thread::yield();
      }
      for (const OperationHandle& handle : handles) {
        ASSERT_TRUE(handle.result());
        EXPECT_FALSE(handle.result()->error);
      }
    }
  }

  void OutlivesItsChannel() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    CompletionQueue queue;
    const Objects objects = a.objects({8});
    const OperationHandle handle = start_endless(a, b, objects, queue, 1);
    a.destroy_channel();
    EXPECT_EQ(next(queue).error, errc::closed);
    handle.cancel();
  }

 private:
  [[nodiscard]] PeerEvent next_event(Node& node) {
    std::error_code ec;
    return node->wait_peer_event(limit(), ec);
  }
};

KVFERRY_TESTING_SUITE(CompletionQueueTest, CompletionQueueTests, EveryCallCanEndInIt,
                      TheDescriptorTellsWhetherThereIsSomething, AHandleTellsAndCancels, ManyThreadsAndOneQueue,
                      MayGoBeforeItsOperationsEnd, MayGoWhileItsOperationsEnd, OutlivesItsChannel);

}  // namespace kvferry::testing
