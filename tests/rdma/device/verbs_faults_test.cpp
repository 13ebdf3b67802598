// SPDX-License-Identifier: Apache-2.0
// Faults of adapters and peers that Soft-RoCE never has by itself.
#include <gtest/gtest.h>

#include <infiniband/verbs.h>

#include <asio/io_context.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <future>
#include <latch>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "rdma/device/watched_verbs.hpp"
#include "rdma/message.hpp"
#include "rdma/rdma_link.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

using watched_verbs::Addresses;
using watched_verbs::made_queues;
using watched_verbs::Watcher;
using watched_verbs::Watching;

bool is_message(const ibv_send_wr& request, MessageHeader& header) {
  if (request.opcode != IBV_WR_SEND) {
    return false;
  }
  std::memcpy(&header, reinterpret_cast<const void*>(request.sg_list[0].addr), sizeof(header));
  return true;
}

TEST(VerbsFaults, ARailWithoutAnAddressIsLeftOutUntilItHasOne) {
  const auto options = [] { return NodeOptions{.rails = 2}; };
  Node node(64, options());
  Node peer(64, options());
  Addresses addresses;
  const std::string first = node.channel->rails()[0].device;
  const std::string second = node.channel->rails()[1].device;
  ASSERT_NE(first, second);
  const auto path = [&] { return node.channel->peer_info("peer")->path; };
  const auto round = [&](unsigned seed) {
    node.connect("node", "peer", peer);
    node.fill(seed);
    EXPECT_EQ(node.channel->batched_write(node.pages(64), {.peer_id = "peer", .remote_indexes = indexes(64)}), 64U);
    EXPECT_TRUE(same(node, peer));
  };
  for (const auto& [lost, left] : {std::pair{first, second}, std::pair{second, first}}) {
    addresses.lose({lost});
    round(1);
    EXPECT_EQ(path().find(lost + ":"), std::string::npos) << path();
    EXPECT_NE(path().find(left + ":"), std::string::npos) << path();
    node.channel->disconnect("peer");
    addresses.lose({});
    round(2);
    EXPECT_NE(path().find(lost + ":"), std::string::npos) << path();
    EXPECT_NE(path().find(left + ":"), std::string::npos) << path();
    node.channel->disconnect("peer");
  }
  addresses.lose({first, second});
  try {
    node.connect("node", "peer", peer);
    ADD_FAILURE() << "no rail is left";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), std::errc::address_not_available);
    for (const std::string& device : {first, second}) {
      EXPECT_NE(std::string(error.what()).find("'" + device + "' has no GID"), std::string::npos) << error.what();
    }
  }
  addresses.lose({});
  round(3);
}

TEST(VerbsFaults, CompletionQueuesTakeTheDevicesInterruptsInTurn) {
  {
    const std::lock_guard lock(made_queues().mutex);
    made_queues().queues.clear();
  }
  Node hub(1);
  std::vector<std::unique_ptr<Node>> peers;
  for (int i = 0; i < 4; ++i) {
    peers.push_back(std::make_unique<Node>(1));
    hub.connect("hub", "peer" + std::to_string(i), *peers.back());
  }
  const std::lock_guard lock(made_queues().mutex);
  ASSERT_FALSE(made_queues().queues.empty());
  const ibv_context* const of_hub = made_queues().queues.front().context;  // it dials, and so makes its own first
  int made = 0;
  for (const auto& queue : made_queues().queues) {
    if (queue.context == of_hub) {
      EXPECT_EQ(queue.interrupt, made++ % std::max(of_hub->num_comp_vectors, 1));
    }
  }
  EXPECT_EQ(made, 4);
}

/// Turns a message into a write with immediate data of as many bytes.
class WritesWithImmediate final : public Watcher {
 public:
  int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) override {
    MessageHeader header;
    for (ibv_send_wr* request = list; request != nullptr; request = request->next) {
      if (is_message(*request, header) && header.type == MessageType::notify && armed.exchange(false)) {
        request->opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
        request->imm_data = 0;
        request->wr.rdma.remote_addr = address;
        request->wr.rdma.rkey = key;
      }
    }
    return Watcher::post_send(pair, list, bad);
  }

  std::atomic<std::uint64_t> address{0};
  std::atomic<std::uint32_t> key{0};
  std::atomic<bool> armed{false};
};

TEST(VerbsFaults, AWriteWithImmediateDataIsTakenForNoMessage) {
  Watching<WritesWithImmediate> writes;
  NodeOptions options;
  options.heard = [&](Endpoint& endpoint) {
    writes->address = endpoint.rails[0].regions[0].address;
    writes->key = endpoint.rails[0].regions[0].keys[0];
  };
  Node node(1, std::move(options));
  Node peer(1);
  node.connect("node", "peer", peer);
  std::string why;
  auto waiting = peer.channel->async_batched_recv(peer.pages(1), {.peer_id = "node", .tag = 7, .diagnostic = &why},
                                                  asio::use_future);
  // So that each receive buffer holds one of them.
  const std::vector<std::byte> payload(8, std::byte{9});
  for (std::size_t i = 0; i < 2 * messages; ++i) {
    node.channel->notify("peer", payload);
    EXPECT_EQ(peer.channel->receive_notification(long_enough).payload, payload);
  }
  writes->armed = true;
  auto written = node.channel->async_notify("peer", payload, {}, asio::use_future);
  EXPECT_EQ(waiting.wait_for(long_enough), std::future_status::ready);
  EXPECT_FALSE(writes->armed);
  std::error_code ec;
  (void)peer.channel->receive_notification(std::chrono::milliseconds(0), ec);
  EXPECT_EQ(ec, errc::timed_out) << "a former message, that was still in the buffer";
  peer.channel->close();
  node.channel->close();
  EXPECT_THROW((void)waiting.get(), std::system_error);
  EXPECT_NE(why.find("the peer wrote with immediate data"), std::string::npos) << why;
  EXPECT_THROW(written.get(), std::system_error);
}

/// Refuses the first request of a list's second operation. Before that it keeps a poster waiting, so that there are two.
class RefusesTheSecond final : public Watcher {
 public:
  int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) override {
    if (waits.exchange(false)) {
      posting.count_down();
      go_on.wait();
    }
    ibv_send_wr* last = nullptr;
    for (ibv_send_wr* request = list; armed && request != nullptr; request = request->next) {
      if (last != nullptr && request->wr_id != last->wr_id && request->wr_id != 0 && list->wr_id != 0) {
        armed = false;
        last->next = nullptr;
        const int result = Watcher::post_send(pair, list, bad);
        last->next = request;
        *bad = request;
        return result != 0 ? result : EINVAL;
      }
      last = request;
    }
    return Watcher::post_send(pair, list, bad);
  }

  std::latch posting{1};
  std::latch go_on{1};
  std::atomic<bool> waits{false};
  std::atomic<bool> armed{false};
};

TEST(VerbsFaults, ThePartOfAListThatIsRefusedIsItsOwnersFaultAlone) {
  Watching<RefusesTheSecond> watching;
  Node node(3);
  Node peer(3);
  node.connect("node", "peer", peer);
  const auto read = [&](std::size_t page) {
    return node.channel->async_batched_read(node.pages(1, page),
                                            {.peer_id = "peer", .remote_indexes = indexes(1, page)}, asio::use_future);
  };
  watching->waits = true;
  std::future<std::size_t> begun;
  std::thread poster([&] { begun = read(0); });
  watching->posting.wait();
  auto innocent = read(1);
  auto refused = read(2);
  watching->armed = true;
  watching->go_on.count_down();
  poster.join();
  const auto code_of = [](std::future<std::size_t>& result) {
    EXPECT_EQ(result.wait_for(long_enough), std::future_status::ready);
    try {
      (void)result.get();
      return std::error_code();
    } catch (const std::system_error& error) {
      return error.code();
    }
  };
  EXPECT_EQ(code_of(refused), std::errc::invalid_argument);
  EXPECT_EQ(code_of(innocent), errc::connection_lost);
  EXPECT_FALSE(watching->armed);
  (void)code_of(begun);  // it may have been done by then
}

/// Adds up how many receive buffers are posted, and of how many the peer is told.
class CountsBuffers final : public Watcher {
 public:
  int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) override {
    MessageHeader header;
    {
      const std::lock_guard lock(mutex_);
      Buffers& buffers = all_[pair];
      for (const ibv_send_wr* request = list; request != nullptr; request = request->next) {
        if (is_message(*request, header)) {
          buffers.told += header.credits;
          farewells += header.type == MessageType::goodbye && header.credits != 0 ? 1U : 0U;
        }
      }
      told_too_many = told_too_many || buffers.told + first_messages > buffers.posted;
    }
    return Watcher::post_send(pair, list, bad);
  }
  int post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad) override {
    {
      const std::lock_guard lock(mutex_);
      std::size_t count = 0;
      for (const ibv_recv_wr* request = list; request != nullptr; request = request->next) {
        ++count;
      }
      Buffers& buffers = all_[pair];
      if (pair->state == IBV_QPS_INIT) {
        buffers = {};  // a new queue pair, perhaps in the place of an old one
      }
      buffers.posted += count;
    }
    return Watcher::post_recv(pair, list, bad);
  }

  std::atomic<bool> told_too_many{false};
  std::atomic<unsigned> farewells{0};

 private:
  struct Buffers {
    std::size_t posted = 0;
    std::size_t told = 0;
  };
  std::mutex mutex_;
  std::map<const ibv_qp*, Buffers> all_;
};

TEST(VerbsFaults, APeerIsToldOnlyOfBuffersThatAreThereAlsoWhenThisSideLeaves) {
  Watching<CountsBuffers> buffers;
  Node node(1);
  for (int round = 0; round < 20; ++round) {
    Node peer(1);
    node.connect("node", "peer", peer);
    const std::vector<std::byte> payload(8);
    std::vector<std::future<void>> written;
    for (int i = 0; i < 500; ++i) {
      written.push_back(node.channel->async_notify("peer", payload, {}, asio::use_future));
    }
    peer.channel->close();
    for (auto& result : written) {
      EXPECT_EQ(result.wait_for(long_enough), std::future_status::ready);
    }
    std::error_code ec;
    node.channel->disconnect("peer", ec);
  }
  EXPECT_FALSE(buffers->told_too_many);
  EXPECT_GT(buffers->farewells, 0U) << "else this tests nothing";
}

/// Counts the receive buffers that are posted before a queue pair can receive.
class CountsFirstBuffers final : public Watcher {
 public:
  int post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad) override {
    for (const ibv_recv_wr* request = list; request != nullptr; request = request->next) {
      posted += pair->state == IBV_QPS_INIT ? 1U : 0U;
    }
    return Watcher::post_recv(pair, list, bad);
  }

  std::atomic<std::size_t> posted{0};
};

TEST(VerbsFaults, APeerThatDoesNotSayHowManyBuffersItHasAtFirstFindsAllOfThemThere) {
  Watching<CountsFirstBuffers> buffers;
  for (const bool says : {true, false}) {
    buffers->posted = 0;
    NodeOptions options;
    if (!says) {
      options.asked = options.heard = [](Endpoint& endpoint) { endpoint.first_messages.reset(); };
    }
    Node node(1, options);
    Node peer(1);
    node.connect("node", "peer", peer);
    EXPECT_EQ(buffers->posted, 2 * (says ? first_messages : messages)) << "both sides'";
    for (const auto& [from, to, id] : {std::tuple(&node, &peer, "peer"), std::tuple(&peer, &node, "node")}) {
      std::vector<std::future<void>> written;
      const std::vector<std::byte> payload(2'000, std::byte{5});
      for (std::size_t i = 0; i < 4 * messages; ++i) {
        written.push_back(from->channel->async_notify(id, payload, {}, asio::use_future));
      }
      for (auto& result : written) {
        result.get();
        EXPECT_EQ(to->channel->receive_notification(long_enough).payload, payload);
      }
    }
  }
}

/// Posts no receive buffer that wasn't there before its queue pair could receive, but for the channel that was the first to have one.
class PostsNoMoreBuffers final : public Watcher {
 public:
  int post_recv(ibv_qp* pair, ibv_recv_wr* list, ibv_recv_wr** bad) override {
    {
      const std::lock_guard lock(mutex_);
      for (ibv_recv_wr* request = list; request != nullptr; request = request->next) {
        if (pair->state == IBV_QPS_INIT) {
          known_.insert(request->sg_list[0].addr);
          spared_ = spared_ == nullptr ? pair->context : spared_;
        } else if (pair->context != spared_ && !known_.contains(request->sg_list[0].addr)) {
          *bad = request;
          ++refused;
          return ENOMEM;
        }
      }
    }
    return Watcher::post_recv(pair, list, bad);
  }

  std::atomic<unsigned> refused{0};

 private:
  std::mutex mutex_;
  std::set<std::uint64_t> known_;
  const ibv_context* spared_ = nullptr;
};

TEST(VerbsFaults, MoreReceiveBuffersThatCannotBePostedEndTheConnectionWithTheReason) {
  Watching<PostsNoMoreBuffers> watching;
  Node node(1);
  Node peer(1);
  node.connect("node", "peer", peer);
  std::string why;
  auto waiting = peer.channel->async_batched_recv(peer.pages(1), {.peer_id = "node", .tag = 7, .diagnostic = &why},
                                                  asio::use_future);
  // One operation, of many messages: another one would connect anew.
  auto written =
      node.channel->async_notify("peer", std::vector<std::byte>(max_notification_bytes), {}, asio::use_future);
  EXPECT_THROW((void)waiting.get(), std::system_error);
  EXPECT_THROW(written.get(), std::system_error);
  EXPECT_GT(watching->refused, 0U);
  const std::string expected =
      "RDMA device '" + peer.channel->rails()[0].device + "': receive buffers can't be posted: ";
  EXPECT_NE(why.find(expected), std::string::npos) << why;
}

/// A channel that memory is used up in when a link has begun to be joined.
class ForgetfulHost final : public kit::LinkHost {
 public:
  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override {
    return kit::RegionList::of({});
  }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte>, std::uint64_t) override { return true; }
  void when_abandoned(std::function<void()>) override { throw std::bad_alloc(); }
  void link_failed(const kit::Link&, std::error_code) override {}

 private:
  const kit::PeerDescription peer_{};
};

TEST(VerbsFaults, ALinkThatThereIsNoMemoryToJoinLeavesNothing) {
  asio::io_context context;
  const auto device = std::make_shared<RailDevice>(first_rails(1)[0], std::string());
  const std::vector<RailPort> ports{
      {device, std::make_shared<DeviceEvents>(context.get_executor(), device),
       std::make_shared<RailDomains>(device, std::span<const MemoryRegion>(), RegistrationOptions(),
                                     RailDomain::Use::of_channel)}};
  LinkOptions options;
  options.rail.queue_pair.queue_depth = 16;
  options.rail.queue_pair.read_depth = 4;
  auto link = RdmaLink::create(context.get_executor(), ports, options);
  const auto peers = RdmaLink::create(context.get_executor(), ports, options);
  int calls = 0;
  EXPECT_THROW(link->join(std::make_shared<ForgetfulHost>(), peers->endpoint(), Role::dialing,
                          kit::Clock::now() + std::chrono::hours(1), [&](const auto&...) { ++calls; }),
               std::bad_alloc);
  const std::weak_ptr<RdmaLink> left = link;
  link.reset();
  EXPECT_TRUE(left.expired()) << "it would report its end at the deadline, to whom the exception has told of it";
  EXPECT_EQ(calls, 0);
  peers->shut(errc::closed, "the test ends");
}

}  // namespace
}  // namespace kvferry::rdma::testing
