// SPDX-License-Identifier: Apache-2.0
// In which order verbs are called when something fails or ends. This program's own definitions of some verbs take the
// place of the library's, note the call, and make it; a post can be made to fail when a part of it is done.
#include <gtest/gtest.h>

#include <dlfcn.h>
#include <infiniband/verbs.h>
#include <pthread.h>

#include <asio/bind_executor.hpp>
#include <asio/system_executor.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <future>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "rdma/message.hpp"
#include "rdma/rdma_node.hpp"

namespace {

struct Log {
  enum class Verb { destroy_queue_pair, do_register, deregister };
  struct Call {
    Verb verb;
    const void* what;  ///< The queue pair; the memory.
    const ibv_context* context;
    std::string thread = {};  ///< deregister: the name of the one that calls it.
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

/// Something to be done when this memory is registered next.
struct BeforeRegistering {
  void set(const void* memory, std::function<void()> what) {
    const std::lock_guard lock(mutex);
    at = memory;
    call = std::move(what);
  }
  void registers(const void* memory) {
    std::function<void()> what;
    {
      const std::lock_guard lock(mutex);
      if (memory == at) {
        what = std::exchange(call, nullptr);
      }
    }
    if (what) {
      what();
    }
  }

  std::mutex mutex;
  const void* at = nullptr;
  std::function<void()> call;
};

BeforeRegistering& before_registering() {
  static BeforeRegistering before;
  return before;
}

/// Where memory begins that can't be registered any more, once it has been so many times.
std::atomic<const void*> registering_fails_at{nullptr};
std::atomic<int> registrations_left{0};

std::atomic<bool> next_long_post_fails{false};
std::atomic<const ibv_qp*> pair_of_failed_post{nullptr};
std::atomic<decltype(ibv_context_ops::post_send)> real_post_send{nullptr};

/// Messages of this type that end something of several messages never go out; 0: all do.
std::atomic<kvferry::rdma::MessageType> last_parts_withheld{};

bool is_withheld(const ibv_send_wr& request) {
  using kvferry::rdma::MessageHeader;
  const auto type = last_parts_withheld.load();
  if (type == kvferry::rdma::MessageType{} || request.opcode != IBV_WR_SEND) {
    return false;
  }
  MessageHeader header;
  std::memcpy(&header, reinterpret_cast<const void*>(request.sg_list[0].addr), sizeof(header));
  return header.type == type && header.first != 0 && (header.flags & MessageHeader::last) != 0;
}

/// Posts the first request of a list and refuses the others, once it has been asked to.
int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) {
  for (ibv_send_wr** request = &list; *request != nullptr; request = &(*request)->next) {
    if (is_withheld(**request)) {
      *request = nullptr;  // with what comes behind it
      break;
    }
  }
  if (list == nullptr) {
    return 0;
  }
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

/// An address at which nobody answers: to resolve it takes until the test says so, as it takes the kernel a second.
class AbsentPeer {
 public:
  static constexpr std::uint8_t last_byte = 199;

  /// @return whether the peer's address is this one; then it took its time.
  bool resolve(const ibv_ah_attr& way) {
    if (way.grh.dgid.raw[15] != last_byte) {
      return false;
    }
    std::unique_lock lock(mutex_);
    ++resolving_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return given_up_; });
    return true;
  }

  [[nodiscard]] bool wait_until_resolving(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(60), [&] { return resolving_ == count; });
  }

  void give_up() {
    const std::lock_guard lock(mutex_);
    given_up_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int resolving_ = 0;
  bool given_up_ = false;
};

AbsentPeer& absent_peer() {
  static AbsentPeer peer;
  return peer;
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

int ibv_modify_qp(ibv_qp* pair, ibv_qp_attr* attributes, int mask) {
  if ((mask & IBV_QP_STATE) != 0 && attributes->qp_state == IBV_QPS_RTR && absent_peer().resolve(attributes->ah_attr)) {
    return ETIMEDOUT;
  }
  return library_function<decltype(ibv_modify_qp)>("ibv_modify_qp")(pair, attributes, mask);
}

#undef ibv_reg_mr
ibv_mr* ibv_reg_mr(ibv_pd* domain, void* address, std::size_t size, int access) {
  before_registering().registers(address);
  if (address == registering_fails_at && registrations_left-- <= 0) {
    errno = ENOMEM;
    return nullptr;
  }
  ibv_mr* const region = library_function<decltype(ibv_reg_mr)>("ibv_reg_mr")(domain, address, size, access);
  verbs_log().add({Log::Verb::do_register, address, domain->context});
  return region;
}

int ibv_dereg_mr(ibv_mr* region) {
  std::array<char, 16> thread{};
  (void)::pthread_getname_np(::pthread_self(), thread.data(), thread.size());
  verbs_log().add({Log::Verb::deregister, region->addr, region->context, thread.data()});
  return library_function<decltype(ibv_dereg_mr)>("ibv_dereg_mr")(region);
}
}

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
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
  EXPECT_EQ(result.get(), condition::may_still_land) << "a part of it had been posted";
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
  EXPECT_EQ(result.get(), condition::may_still_land) << "a part of it had been posted";
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

TEST(VerbsOrder, APeerThatStopsWithinAListOrANotificationIsGivenUpAfterThePartsTimeout) {
  for (const auto type : {MessageType::notify, MessageType::recv_post}) {
    SCOPED_TRACE(type == MessageType::notify ? "notification" : "recv");
    std::string why;
    NodeOptions options;
    options.channel.parts_timeout = std::chrono::milliseconds(100);
    Node node(1, std::move(options));
    Node peer(1000);
    peer.connect("peer", "node", node);
    auto waiting = node.channel->async_batched_recv(node.pages(1), {.peer_id = "peer", .tag = 7, .diagnostic = &why},
                                                    asio::use_future);
    last_parts_withheld = type;
    std::future<std::size_t> stopped;
    if (type == MessageType::notify) {
      const std::vector<std::byte> notification(max_notification_bytes);
      stopped = peer.channel->async_batched_write(std::vector<MutableBuffer>(),
                                                  {.peer_id = "node", .notification = notification}, asio::use_future);
    } else {
      stopped = peer.channel->async_batched_recv(peer.pages(1000), {.peer_id = "node", .tag = 8}, asio::use_future);
    }
    const auto status = waiting.wait_for(long_enough);
    last_parts_withheld = MessageType{};
    ASSERT_EQ(status, std::future_status::ready);
    try {
      (void)waiting.get();
      ADD_FAILURE() << "nothing was sent";
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::connection_lost);
    }
    EXPECT_NE(why.find("the peer stopped within a recv's list of buffers, or a notification, for 100 ms"), std::string::npos)
        << why;
  }
}

/// How often memory is registered, of what has been noted.
std::ptrdiff_t registrations(const void* memory) {
  const std::lock_guard lock(verbs_log().mutex);
  const auto& calls = verbs_log().calls;
  const auto count = [&](Log::Verb verb) {
    return std::ranges::count_if(calls,
                                 [&](const Log::Call& call) { return call.verb == verb && call.what == memory; });
  };
  return count(Log::Verb::do_register) - count(Log::Verb::deregister);
}

NodeOptions isolating(std::size_t rails = 1) {
  NodeOptions options{.rails = rails};
  options.channel.isolate_peers = true;
  return options;
}

TEST(VerbsOrder, IsolatedPeersHaveRegistrationsOfTheirOwnThatEndWithTheirQueuePairs) {
  for (const std::size_t rails : {1U, 2U}) {
    SCOPED_TRACE(rails);
    verbs_log().clear();
    const auto of_each = static_cast<std::ptrdiff_t>(rails);
    Node hub(4, isolating(rails));
    const auto of_hub = [&] { return registrations(hub.region.data()); };
    EXPECT_EQ(of_hub(), 0) << "only tried";
    Node dialed(4, {.rails = rails});
    Node asking(4, {.rails = rails});
    hub.connect("hub", "dialed", dialed);
    EXPECT_EQ(of_hub(), of_each);
    asking.connect("asking", "hub", hub);
    EXPECT_EQ(of_hub(), 2 * of_each);
    std::vector<std::byte> later(page_size);
    const std::uint32_t number = hub.channel->add_region({later.data(), later.size(), page_size});
    EXPECT_EQ(registrations(later.data()), 2 * of_each);
    const auto write_later = [&](const Node& peer) {
      const auto index = indexes(1);
      std::error_code ec;
      peer.channel->batched_write(peer.pages(1), {.peer_id = "hub", .remote_indexes = index, .remote_region = number}, ec);
      return ec;
    };
    EXPECT_FALSE(write_later(asking));
    hub.channel->disconnect("dialed");
    EXPECT_EQ(of_hub(), of_each);
    EXPECT_EQ(registrations(later.data()), of_each);
    EXPECT_FALSE(write_later(asking));
    EXPECT_FALSE(write_later(dialed)) << "connects anew";
    EXPECT_EQ(registrations(later.data()), 2 * of_each);
    hub.channel->remove_region(number);
    EXPECT_EQ(registrations(later.data()), 0);
    EXPECT_EQ(of_hub(), 2 * of_each);
    EXPECT_EQ(asking.channel->batched_read(asking.pages(4), {.peer_id = "hub", .remote_indexes = indexes(4)}), 4U);
    // Of a peer that goes by itself as well.
    asking.channel->close();
    EXPECT_TRUE(eventually([&] { return of_hub() == of_each; }));
    {
      const std::lock_guard lock(verbs_log().mutex);
      const auto& calls = verbs_log().calls;
      const auto last = std::find_if(calls.rbegin(), calls.rend(), [&](const Log::Call& call) {
        return call.verb == Log::Verb::deregister && call.what == hub.region.data();
      });
      ASSERT_NE(last, calls.rend());
      EXPECT_EQ(last->thread, "kvferry-join") << "not one that others need";
    }
    hub.channel->close();
    EXPECT_EQ(of_hub(), 0);
    const std::lock_guard lock(verbs_log().mutex);
    const auto& calls = verbs_log().calls;
    const auto last = std::find_if(calls.rbegin(), calls.rend(), [&](const Log::Call& call) {
      return call.verb == Log::Verb::deregister && call.what == hub.region.data();
    });
    ASSERT_NE(last, calls.rend());
    EXPECT_TRUE(std::none_of(calls.rbegin(), last, [&](const Log::Call& call) {
      return call.verb == Log::Verb::destroy_queue_pair && call.context == last->context;
    })) << "while a queue pair could reach it";
  }
}

TEST(VerbsOrder, ARegionThatCantBeRegisteredForAnIsolatedNewcomerEndsHisAttemptAlone) {
  verbs_log().clear();
  Node hub(4, isolating(2));
  Node first(4, {.rails = 2});
  Node newcomer(4, {.rails = 2});
  first.connect("first", "hub", hub);
  const auto reads = [](const Node& node) {
    std::error_code ec;
    const auto all = indexes(4);
    node.channel->batched_read(node.pages(4), {.peer_id = "hub", .remote_indexes = all}, ec);
    return ec;
  };
  registering_fails_at = hub.region.data();
  registrations_left = 1;  // on one rail
  try {
    newcomer.connect("newcomer", "hub", hub);
    ADD_FAILURE() << "it connected";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::resource_limit);
    EXPECT_NE(std::string(error.what()).find("region 0: RDMA device"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("Cannot allocate memory"), std::string::npos) << error.what();
  }
  registrations_left = 1;
  try {
    hub.connect("hub", "newcomer", newcomer);
    ADD_FAILURE() << "it connected";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory);
    EXPECT_NE(std::string(error.what()).find("region 0: RDMA device"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("ulimit -l"), std::string::npos) << error.what();
  }
  registering_fails_at = nullptr;
  EXPECT_EQ(registrations(hub.region.data()), 2) << "those of the first, on two rails";
  EXPECT_FALSE(reads(first));
  newcomer.connect("newcomer", "hub", hub);
  EXPECT_FALSE(reads(newcomer));

  std::vector<std::byte> later(page_size);
  registering_fails_at = later.data();
  registrations_left = 3;
  std::error_code ec;
  (void)hub.channel->add_region({later.data(), later.size(), page_size}, ec);
  registering_fails_at = nullptr;
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  EXPECT_EQ(registrations(later.data()), 0);
  EXPECT_EQ(hub.channel->regions().size(), 1U);
  EXPECT_FALSE(reads(first));
  EXPECT_FALSE(reads(newcomer));
}

TEST(VerbsOrder, ARegionThatIsRemovedWhileItIsRegisteredForAnIsolatedNewcomerIsNotRegisteredAfterwards) {
  for (const bool dialed : {false, true}) {
    SCOPED_TRACE(dialed ? "the owner connects" : "the peer connects");
    Node hub(1, isolating());
    Node peer(1);
    std::vector<std::byte> memory(page_size);
    const std::uint32_t number = hub.channel->add_region({memory.data(), memory.size(), page_size});
    verbs_log().clear();
    std::error_code removed = errc::timed_out;
    before_registering().set(memory.data(), [&] { hub.channel->remove_region(number, long_enough, removed); });
    const auto connect = [&] {
      std::error_code ec;
      if (dialed) {
        hub.channel->lazy_init_peer_connection("hub", "peer", peer.channel->peer_init_url(), {}, {.timeout = long_enough}, ec);
      } else {
        peer.channel->lazy_init_peer_connection("peer", "hub", hub.channel->peer_init_url(), {}, {.timeout = long_enough}, ec);
      }
      return ec;
    };
    (void)connect();  // with the removed region's keys told: it may be cut off
    EXPECT_FALSE(removed) << removed.message();
    EXPECT_EQ(registrations(memory.data()), 0);
    EXPECT_TRUE(eventually([&] { return !connect(); }));
    EXPECT_EQ(registrations(memory.data()), 0);
  }
}

TEST(VerbsOrder, RegionsThatComeAndGoWhileIsolatedPeersDoLeaveNoRegistrations) {
  verbs_log().clear();
  Node hub(1, isolating());
  Node peer(1);
  std::vector<std::byte> memory(page_size);
  std::atomic<bool> over{false};
  auto changes = std::async(std::launch::async, [&] {
    int rounds = 0;
    for (; !over; ++rounds) {
      hub.channel->remove_region(hub.channel->add_region({memory.data(), memory.size(), page_size}));
    }
    return rounds;
  });
  int connected = 0;
  for (int i = 0; i < 15; ++i) {
    std::error_code ec;
    // Who meets a removal on the way is cut off, and comes again.
    peer.channel->lazy_init_peer_connection("peer", "hub", hub.channel->peer_init_url(), {}, {.timeout = long_enough}, ec);
    connected += ec ? 0 : 1;
    if (i % 2 == 0) {
      peer.channel->disconnect("hub", ec);
    } else {
      hub.channel->disconnect("peer", ec);
    }
  }
  over = true;
  EXPECT_GT(changes.get(), 0);
  EXPECT_GT(connected, 0);
  EXPECT_EQ(registrations(memory.data()), 0);
  peer.connect("peer", "hub", hub);
  EXPECT_EQ(registrations(hub.region.data()), 1);
  hub.channel->close();
  EXPECT_EQ(registrations(hub.region.data()), 0);
  EXPECT_EQ(registrations(memory.data()), 0);
}

TEST(VerbsOrder, WhatCantBeRegisteredForIsolatedPeersIsSaidBeforeAnyIsThere) {
  Node hub(4, isolating());
  std::vector<std::byte> memory(page_size);
  registering_fails_at = memory.data();
  registrations_left = 0;
  std::error_code ec;
  (void)hub.channel->add_region({memory.data(), memory.size(), page_size}, ec);
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  RdmaOptions options;
  options.isolate_peers = true;
  options.rails = first_rails(1);
  options.regions.push_back({memory.data(), memory.size(), page_size});
  EXPECT_THROW(RdmaTransferChannel{options}, TransferError);
  registering_fails_at = nullptr;
}

TEST(VerbsOrder, Line04_AnAddressAtWhichNobodyAnswersDelaysNoOtherPeer) {
  const ChangeEndpoint make_absent = [](Endpoint& endpoint) {
    endpoint.rails[0].gid.back() = std::byte{AbsentPeer::last_byte};
  };
  Node hub(1);
  NodeOptions asks;
  asks.asked = make_absent;
  Node asking(1, std::move(asks));
  NodeOptions answers;
  answers.told = make_absent;
  Node answering(1, std::move(answers));
  const auto connect = [](const Node& from, const std::string& own_id, const std::string& peer_id, const Node& to) {
    return std::async(std::launch::async, [&from, own_id, peer_id, url = to.channel->peer_init_url()] {
      std::error_code ec;
      from.channel->lazy_init_peer_connection(own_id, peer_id, url, {}, {.timeout = long_enough}, ec);
      return ec;
    });
  };
  // The hub resolves one peer's address when it is asked, another's when it asks.
  auto accepted = connect(asking, "asking", "hub", hub);
  auto dialed = connect(hub, "hub", "answering", answering);
  ASSERT_TRUE(absent_peer().wait_until_resolving(2));
  Node other(1);
  other.connect("other", "hub", hub);
  Node another(1);
  hub.connect("hub", "another", another);
  absent_peer().give_up();
  EXPECT_TRUE(accepted.get());
  EXPECT_EQ(dialed.get(), std::errc::timed_out);
}

TEST(VerbsOrder, ScatteredObjectsOutsideOfRegionsAreCopiedRatherThanRegisteredOneByOne) {
  constexpr std::size_t count = 256;
  Node node(1);
  Node peer(count);
  node.connect("node", "peer", peer);
  std::vector<std::byte> outside(4 * count * page_size);
  std::vector<MutableBuffer> scattered;
  for (std::size_t i = 0; i < count; ++i) {
    scattered.push_back(MutableBuffer(outside).subspan(4 * i * page_size, page_size));
    std::ranges::fill(scattered.back(), static_cast<std::byte>(i));
  }
  const auto registered = [&] {
    const std::lock_guard lock(verbs_log().mutex);
    return std::ranges::count_if(verbs_log().calls, [&](const Log::Call& call) {
      return call.verb == Log::Verb::do_register && call.what >= outside.data() &&
             call.what < outside.data() + outside.size();
    });
  };
  const auto all = indexes(count);
  verbs_log().clear();
  EXPECT_EQ(node.channel->batched_write(scattered, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 0);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
    std::ranges::fill(scattered[i], std::byte{0});
  }
  EXPECT_EQ(node.channel->batched_read(scattered, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 0);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
  }
  // What lies end to end is one range, and large.
  std::vector<MutableBuffer> adjacent;
  for (std::size_t i = 0; i < count; ++i) {
    adjacent.push_back(MutableBuffer(outside).subspan(i * page_size, page_size));
  }
  EXPECT_EQ(node.channel->batched_write(adjacent, {.peer_id = "peer", .remote_indexes = all}), count);
  EXPECT_EQ(registered(), 1);
}

TEST(VerbsOrder, MoreScatteredObjectsThanThereAreBlocksToCopyThrough) {
  constexpr std::size_t count = 1024;
  Node node(1);
  Node peer(count);
  peer.fill(3);
  node.connect("node", "peer", peer);
  std::vector<std::byte> outside(2 * count * page_size);
  std::vector<MutableBuffer> scattered;
  for (std::size_t i = 0; i < count; ++i) {
    scattered.push_back(MutableBuffer(outside).subspan(2 * i * page_size, page_size));
  }
  EXPECT_EQ(node.channel->batched_read(scattered, {.peer_id = "peer", .remote_indexes = indexes(count)}), count);
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_TRUE(std::ranges::equal(scattered[i], peer.page(i))) << i;
  }
}

}  // namespace
}  // namespace kvferry::rdma::testing
