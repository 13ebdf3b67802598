// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/dispatch.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <semaphore>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// How handlers are called: exactly once (all tests of the suite see to that), never inside the call that started the
/// operation, on the right executor, and free to do as they like.
class CompletionTests : public ConformanceBase {
 protected:
  using StartWithHandler = std::function<void(std::function<void()>)>;

  /// Ways for an operation to end at once, and one that takes a while; each calls its handler.
  [[nodiscard]] std::vector<std::pair<std::string, StartWithHandler>> ways_to_end(Node& a, Node& b,
                                                                                  const Objects& objects) {
    std::vector<std::pair<std::string, StartWithHandler>> ways;
    BaseTransferChannel& channel = a.channel();
    const auto ending = [](std::function<void()>& end) {
      return [end = std::move(end)](std::error_code, const auto&) { end(); };
    };
    for (const TransferKind kind : {TransferKind::send, TransferKind::recv, TransferKind::write, TransferKind::read}) {
      const std::string name(to_string(kind));
      const auto request = [kind, objects](const std::string& peer, const std::vector<std::uint64_t>& indexes) {
        TransferRequest result = BaseTransferChannel::make_request(kind, objects.writable(), spec_of(kind, indexes));
        result.peer_id = peer;
        result.timeout = std::chrono::milliseconds(50);
        return result;
      };
      const auto add = [&](const std::string& what, const TransferRequest& prepared) {
        ways.emplace_back(name + " " + what, [&channel, prepared, ending](std::function<void()> end) {
          channel.async_transfer(prepared, ending(end));
        });
      };
      TransferRequest empty = request(b.id(), {});
      empty.objects.clear();
      add("of nothing", empty);
      add("to a stranger", request("stranger", {3, 2}));
      add("to nobody", request("", {3, 2}));
      add("of an index out of range", request(b.id(), {3, 1u << 20}));
      add("that takes a while", request(b.id(), {3, 2}));
      TransferRequest late = request(b.id(), {3, 2});
      late.timeout = std::chrono::milliseconds(0);
      add("within no time", late);
    }
    const std::string id = a.id();
    const std::string url = b.url();
    ways.emplace_back("handshake that is done already", [&channel, ending, id, peer = b.id(), url](auto end) {
      channel.async_lazy_init_peer_connection(id, peer, url, {}, {}, ending(end));
    });
    ways.emplace_back("handshake without an id", [&channel, ending, id, url](auto end) {
      channel.async_lazy_init_peer_connection(id, "", url, {}, {}, ending(end));
    });
    ways.emplace_back("handshake without a url", [&channel, ending, id](auto end) {
      channel.async_lazy_init_peer_connection(id, "other", "", {}, {}, ending(end));
    });
    ways.emplace_back("side message without a url", [&channel, ending](auto end) {
      channel.async_send_init_side_msg("", SideMessage("X", {}), {}, ending(end));
    });
    ways.emplace_back("receive_notification", [&channel, ending](auto end) {
      channel.async_receive_notification(std::chrono::milliseconds(0), ending(end));
    });
    return ways;
  }

  /// Starts each while holding what the handler waits for: a handler that ran inside the call, or that the call waited
  /// for, would not get it.
  void expect_never_inline(const std::vector<std::pair<std::string, StartWithHandler>>& ways) {
    for (const auto& [name, start_way] : ways) {
      SCOPED_TRACE(name);
      struct Shared {
        std::binary_semaphore held{0};
        std::promise<bool> got;
      };
      const auto shared = std::make_shared<Shared>();
      auto got = shared->got.get_future();
      {
        const InitiationScope initiating;
        start_way([shared, limit = limit()] {
          shared->got.set_value(!InitiationScope::active() && shared->held.try_acquire_for(limit));
        });
      }
      shared->held.release();
      EXPECT_TRUE(in_time(got)) << "ran inside the call that started the operation, or blocked it";
    }
  }

 public:
  void NeverInline() {
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64});
    expect_never_inline(ways_to_end(a, b, objects));
  }

  void NeverInlineAfterClose() {
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64});
    const auto ways = ways_to_end(a, b, objects);
    a->close();
    expect_never_inline(ways);
  }

  void NeverInlineOnTheChannelsExecutor() {
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64});
    for (const auto& [name, start_way] : ways_to_end(a, b, objects)) {
      SCOPED_TRACE(name);
      const auto started = std::make_shared<std::atomic<bool>>(false);
      const auto after_start = std::make_shared<std::promise<bool>>();
      auto result = after_start->get_future();
      // Only there could a dispatch in place of a post go unnoticed.
      asio::post(a->get_executor(), [start_way = start_way, started, after_start] {
        const InitiationScope initiating;
        start_way([started, after_start] { after_start->set_value(!InitiationScope::active()); });
      });
      EXPECT_TRUE(in_time(result)) << "ran inside the call that started the operation";
    }
  }

  void OnTheChannelsExecutor() {
    const auto [a, b] = connected_pair();
    const asio::any_io_executor executor = a->get_executor();
    // An executor may run in place what is dispatched to it from itself; if this one does, that tells whether one is on
    // it.
    const auto runs_in_place = [executor] {
      const auto ran_on = std::make_shared<std::atomic<std::thread::id>>();
      asio::dispatch(executor, [ran_on] { *ran_on = std::this_thread::get_id(); });
      return ran_on->load() == std::this_thread::get_id();
    };
    std::promise<bool> inside;
    auto tells = inside.get_future();
    asio::post(executor, [&] { inside.set_value(runs_in_place()); });
    if (!in_time(tells) || runs_in_place()) {
      GTEST_SKIP() << "the channel's executor does not tell whether one is on it";
    }
    for (const auto& [name, start_way] : ways_to_end(a, b, a.objects({64, 64}))) {
      std::promise<bool> promise;
      auto on_it = promise.get_future();
      start_way([&] { promise.set_value(runs_in_place()); });
      EXPECT_TRUE(in_time(on_it)) << name;
    }
  }

  void HandlersStartTheNextOperation() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    struct Chain {
      BaseTransferChannel& channel;
      TransferRequest request;
      int left = 500;
      std::promise<std::error_code> end;

      void next() {
        const InitiationScope initiating;
        channel.async_transfer(request, [this](std::error_code error, std::size_t) {
          if (error || InitiationScope::active() || --left == 0) {
            end.set_value(error);
          } else {
            next();
          }
        });
      }
    };
    const Objects objects = a.objects({64}).fill(1);
    const std::vector<std::uint64_t> indexes{5};
    TransferSpec spec = at(indexes);
    spec.peer_id = b.id();
    Chain chain{a.channel(), BaseTransferChannel::make_request(TransferKind::write, objects.readable(), spec), 500, {}};
    auto end = chain.end.get_future();
    chain.next();
    EXPECT_FALSE(in_time(end));
    EXPECT_EQ(chain.left, 0);
    EXPECT_TRUE(page_holds(b.page(5), 64, 1));
  }

  void HandlersCallEverythingThatDoesNotBlock() {
    const auto [a, b] = connected_pair();
    std::promise<bool> promise;
    auto known = promise.get_future();
    a->async_send_init_side_msg("", SideMessage("X", {}), {}, [&, &node = a, &peer = b](std::error_code, const auto&) {
      static_cast<void>(node->regions());
      static_cast<void>(node->peer_init_url());
      static_cast<void>(node->capabilities());
      promise.set_value(node->remote_xfer_handler_exists(peer.id()) && node->peer_info(peer.id()).has_value());
    });
    EXPECT_TRUE(in_time(known));
  }

  void HandlersMayCloseTheChannel() {
    const auto [a, b] = connected_pair();
    std::vector<std::shared_ptr<Transfer>> pending;
    for (std::uint64_t tag = 0; capabilities().send_recv && tag < 10; ++tag) {
      pending.push_back(start(TransferKind::recv, a, b, a.objects({64}), tagged(tag)));
    }
    std::promise<bool> promise;
    auto refused = promise.get_future();
    const Objects objects = a.objects({64});
    a->async_send_init_side_msg("", SideMessage("X", {}), {}, [&, &node = a, &peer = b](std::error_code, const auto&) {
      node->close();
      node->close();
      promise.set_value(!node->remote_xfer_handler_exists(peer.id()));
    });
    EXPECT_TRUE(in_time(refused));
    for (const auto& transfer : pending) {
      EXPECT_EQ(transfer->outcome(), failed(errc::closed));
    }
    EXPECT_EQ(start_connect(a, a.id(), b.id(), b.url())->error(), errc::closed);
  }

  void BlockingInAHandlerIsNoticed() {
    if (!facts().notices_blocking_in_handler) {
      GTEST_SKIP() << "the traits do not promise that blocking calls in handlers are noticed";
    }
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64});
    std::promise<std::vector<std::error_code>> promise;
    auto result = promise.get_future();
    const std::string url = b.url();
    a->async_send_init_side_msg("", SideMessage("X", {}), {}, [&, &node = a, &peer = b](std::error_code, const auto&) {
      std::vector<std::error_code> errors(11);
      node->batched_recv(objects.writable(), {.peer_id = peer.id()}, errors[0]);
      node->batched_send(objects.readable(), {.peer_id = peer.id()}, errors[1]);
      node->receive_notification({}, errors[2]);
      node->lazy_init_peer_connection(node.id(), peer.id(), url, {}, {}, errors[3]);
      node->send_init_side_msg(url, SideMessage("X", {}), {}, errors[4]);
      node->batched_read(objects.writable(), {.peer_id = peer.id()}, errors[5]);
      node->receive_notifications(1, 1, {}, errors[6]);
      node->notify(peer.id(), {}, {}, errors[7]);
      node->wait_peer_event({}, errors[8]);
      node->fence(peer.id(), {}, errors[9]);
      node->disconnect(peer.id(), errors[10]);
      promise.set_value(errors);
    });
    EXPECT_EQ(in_time(result), std::vector<std::error_code>(11, errc::would_deadlock));
    expect_usable(a, b);
  }
};

KVFERRY_TESTING_SUITE(CompletionTest, CompletionTests, NeverInline, NeverInlineAfterClose,
                      NeverInlineOnTheChannelsExecutor, OnTheChannelsExecutor, HandlersStartTheNextOperation,
                      HandlersCallEverythingThatDoesNotBlock, HandlersMayCloseTheChannel, BlockingInAHandlerIsNoticed);

}  // namespace kvferry::testing
