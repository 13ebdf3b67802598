// SPDX-License-Identifier: Apache-2.0
// In which order verbs are called when something fails or ends. This program's own definitions of some verbs take the
// place of the library's, note the call, and make it; a post can be made to fail when a part of it is done.
#include <gtest/gtest.h>

#include <dlfcn.h>
#include <infiniband/verbs.h>

#include <asio/bind_executor.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <future>
#include <mutex>
#include <vector>

#include "rdma/rdma_node.hpp"

namespace {

struct Log {
  enum class Verb { destroy_queue_pair, deregister };
  struct Call {
    Verb verb;
    const void* what;  ///< The queue pair; the memory.
    const ibv_context* context;
  };

  void add(const Call& call) {
    const std::lock_guard lock(mutex);
    calls.push_back(call);
  }
  void clear() {
    const std::lock_guard lock(mutex);
    calls.clear();
  }

  std::mutex mutex;
  std::vector<Call> calls;
};

Log& verbs_log() {
  static Log log;
  return log;
}

std::atomic<bool> next_long_post_fails{false};
std::atomic<const ibv_qp*> pair_of_failed_post{nullptr};
std::atomic<decltype(ibv_context_ops::post_send)> real_post_send{nullptr};

/// Posts the first request of a list and refuses the others, once it has been asked to.
int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) {
  if (list->next == nullptr || !next_long_post_fails.exchange(false)) {
    return real_post_send.load()(pair, list, bad);
  }
  pair_of_failed_post = pair;
  ibv_send_wr* const rest = list->next;
  list->next = nullptr;
  const int result = real_post_send.load()(pair, list, bad);
  list->next = rest;
  *bad = rest;
  return result != 0 ? result : ENOMEM;
}

template <class Function>
Function* library_function(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ibv_qp* ibv_create_qp(ibv_pd* domain, ibv_qp_init_attr* attributes) {
  ibv_qp* const pair = library_function<decltype(ibv_create_qp)>("ibv_create_qp")(domain, attributes);
  if (pair != nullptr && pair->context->ops.post_send != &post_send) {
    real_post_send = pair->context->ops.post_send;
    pair->context->ops.post_send = &post_send;
  }
  return pair;
}

int ibv_destroy_qp(ibv_qp* pair) {
  const Log::Call call{Log::Verb::destroy_queue_pair, pair, pair->context};
  const int result = library_function<decltype(ibv_destroy_qp)>("ibv_destroy_qp")(pair);
  verbs_log().add(call);
  return result;
}

int ibv_dereg_mr(ibv_mr* region) {
  verbs_log().add({Log::Verb::deregister, region->addr, region->context});
  return library_function<decltype(ibv_dereg_mr)>("ibv_dereg_mr")(region);
}
}

namespace kvferry::rdma::testing {
namespace {

bool is_destroyed(const ibv_qp* pair) {
  const std::lock_guard lock(verbs_log().mutex);
  return std::ranges::any_of(verbs_log().calls, [&](const Log::Call& call) {
    return call.verb == Log::Verb::destroy_queue_pair && call.what == pair;
  });
}

TEST(VerbsOrder, Line19_APartlyFailedPostDestroysTheQueuePairAndEndsTheOperationThen) {
  Node node(64);
  Node peer(64);
  node.fill(1);
  node.connect("node", "peer", peer);
  // Scattered, so that there are several requests.
  std::vector<std::uint64_t> reversed = indexes(64);
  std::ranges::reverse(reversed);
  verbs_log().clear();
  next_long_post_fails = true;
  bool destroyed_at_end = false;
  std::promise<std::error_code> ended;
  node.channel->async_batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = reversed},
                                    asio::bind_executor(asio::system_executor(), [&](std::error_code ec, std::size_t) {
                                      destroyed_at_end = is_destroyed(pair_of_failed_post);
                                      ended.set_value(ec);
                                    }));
  auto result = ended.get_future();
  ASSERT_EQ(result.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(result.get(), std::errc::not_enough_memory);
  EXPECT_FALSE(next_long_post_fails);
  EXPECT_TRUE(destroyed_at_end);
  // Nothing that was posted still reads these buffers: the next write makes a new connection, and is whole.
  node.fill(2);
  EXPECT_EQ(node.channel->batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = indexes(64)}), 64U);
  EXPECT_TRUE(same(node, peer));
}

TEST(VerbsOrder, Line20_WhatWasRegisteredForAFailedOperationIsDeregisteredBeforeItEnds) {
  constexpr std::size_t count = 256;
  Node node(1);
  Node peer(count);
  node.connect("node", "peer", peer);
  std::vector<std::byte> outside(count * page_size);
  std::vector<MutableBuffer> objects;
  for (std::size_t i = 0; i < count; ++i) {
    objects.push_back(MutableBuffer(outside).subspan(i * page_size, page_size));
  }
  std::vector<std::uint64_t> reversed = indexes(count);
  std::ranges::reverse(reversed);
  const auto deregistered = [&] {
    const std::lock_guard lock(verbs_log().mutex);
    return std::ranges::count_if(verbs_log().calls, [&](const Log::Call& call) {
      return call.verb == Log::Verb::deregister && call.what >= outside.data() &&
             call.what < outside.data() + outside.size();
    });
  };
  verbs_log().clear();
  next_long_post_fails = true;
  std::ptrdiff_t deregistered_at_end = 0;
  std::promise<std::error_code> ended;
  node.channel->async_batched_write(objects, {.peer_id = "peer", .remote_indexes = reversed},
                                    asio::bind_executor(asio::system_executor(), [&](std::error_code ec, std::size_t) {
                                      deregistered_at_end = deregistered();
                                      ended.set_value(ec);
                                    }));
  auto result = ended.get_future();
  ASSERT_EQ(result.wait_for(long_enough), std::future_status::ready);
  EXPECT_EQ(result.get(), std::errc::not_enough_memory);
  EXPECT_GE(deregistered_at_end, 1);
  node.channel->close();
  EXPECT_EQ(deregistered(), deregistered_at_end);
}

TEST(VerbsOrder, Line20_RegionsAreDeregisteredAfterTheLastQueuePair) {
  Node hub(64);
  std::vector<std::unique_ptr<Node>> peers;
  for (int i = 0; i < 3; ++i) {
    peers.push_back(std::make_unique<Node>(64));
    hub.connect("hub", "peer" + std::to_string(i), *peers.back());
  }
  std::vector<std::future<std::size_t>> writes;
  for (int i = 0; i < 30; ++i) {
    writes.push_back(hub.channel->async_batched_write(
        hub.pages(64), {.peer_id = "peer" + std::to_string(i % 3), .remote_indexes = indexes(64)}, asio::use_future));
  }
  verbs_log().clear();
  hub.channel->close();
  for (auto& write : writes) {
    EXPECT_EQ(write.wait_for(long_enough), std::future_status::ready);
  }
  const std::lock_guard lock(verbs_log().mutex);
  const auto& calls = verbs_log().calls;
  const auto region = std::ranges::find_if(calls, [&](const Log::Call& call) {
    return call.verb == Log::Verb::deregister && call.what == hub.region.data();
  });
  ASSERT_NE(region, calls.end());
  const auto is_pair_of_hub = [&](const Log::Call& call) {
    return call.verb == Log::Verb::destroy_queue_pair && call.context == region->context;
  };
  EXPECT_EQ(std::count_if(calls.begin(), region, is_pair_of_hub), 3);
  EXPECT_EQ(std::count_if(region, calls.end(), is_pair_of_hub), 0);
}

}  // namespace
}  // namespace kvferry::rdma::testing
