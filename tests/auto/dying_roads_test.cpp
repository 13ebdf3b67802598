// SPDX-License-Identifier: Apache-2.0
// Roads that end while they are used, and peers that come back on another one.
#include <gtest/gtest.h>

#include <asio/thread_pool.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/peer_event.hpp>

#include "auto_node.hpp"
#include "common/lasting_port.hpp"

namespace kvferry::inline KVFERRY_ABI::roads::testing {
namespace {

using std::chrono::milliseconds;

/// "a" has connected to "b", over a road within the host that may die.
struct Pair {
  Pair() : a(with({mortal_shm(fate), tcp()})) {
    EXPECT_FALSE(a.connect(b));
    EXPECT_TRUE(begins(a.path_to("b"), "shm ")) << a.path_to("b");
  }

  const std::shared_ptr<Fate> fate = std::make_shared<Fate>();
  Node b;
  Node a;
};

TEST(AutoDeath, TheNextOperationTakesTheOtherRoad) {
  Pair pair;
  EXPECT_FALSE(pair.a.write(1));
  pair.fate->die();
  EXPECT_FALSE(pair.a.write(2));
  EXPECT_TRUE(pair.b.holds(2));
  EXPECT_TRUE(begins(pair.a.path_to("b"), "tcp ")) << pair.a.path_to("b");
  EXPECT_TRUE(has(pair.a.path_to("b"), "; not shm: its port is down")) << pair.a.path_to("b");
  EXPECT_TRUE(has(pair.b.path_to("a"), "; not shm: its port is down")) << pair.b.path_to("a");
  EXPECT_TRUE(pair.a.warned("path_chosen: road tcp; not shm: its port is down"));
  // The other way as well, over the same road.
  EXPECT_FALSE(pair.b.write(3, "a"));
  EXPECT_TRUE(pair.a.holds(3));
  EXPECT_TRUE(begins(pair.b.path_to("a"), "tcp "));

  // Not taken again before somebody has it chosen anew.
  pair.fate->set(Fate::State::alive);
  EXPECT_FALSE(pair.a.write(4));
  EXPECT_TRUE(begins(pair.a.path_to("b"), "tcp "));
  pair.a.channel->disconnect("b");
  ASSERT_FALSE(pair.a.connect(pair.b));
  EXPECT_TRUE(begins(pair.a.path_to("b"), "shm ")) << pair.a.path_to("b");
}

TEST(AutoDeath, WhatWasPendingEndsAndWhatFollowsMeetsOnTheOtherRoad) {
  Pair pair;
  std::vector<MutableBuffer> targets{pair.b.at(0)};
  auto pending = pair.b.channel->async_batched_recv(targets, {.peer_id = "a", .tag = 7}, asio::use_future);
  // The recv has reached "a", or waits: either way it ends with the road.
  EXPECT_FALSE(pair.a.write(1));
  pair.fate->die();
  EXPECT_THROW((void)pending.get(), std::system_error);
  // Both sides agree on one road: the pair meets.
  auto again = pair.b.channel->async_batched_recv(targets, {.peer_id = "a", .tag = 7}, asio::use_future);
  kvferry::testing::fill(pair.a.at(1), 99);
  const std::vector<ConstBuffer> objects{pair.a.at(1)};
  EXPECT_EQ(pair.a.channel->batched_send(objects, {.peer_id = "b", .tag = 7}), 1U);
  EXPECT_EQ(again.get(), 1U);
  EXPECT_TRUE(kvferry::testing::matches(pair.b.at(0), 99));
}

TEST(AutoDeath, NotificationsComeToOneInboxWhateverTheRoad) {
  Pair pair;
  const std::array one{std::byte{1}};
  const std::array two{std::byte{2}};
  pair.a.channel->notify("b", one);
  pair.fate->die();
  pair.a.channel->notify("b", two);
  pair.a.channel->notify("b", one, {.key = 5});
  EXPECT_EQ(pair.b.channel->receive_notification(long_enough).payload.at(0), std::byte{1});
  EXPECT_EQ(pair.b.channel->receive_notification(long_enough).payload.at(0), std::byte{2});
  EXPECT_EQ(pair.b.channel->receive_notifications(5, 1, long_enough).size(), 1U);
}

/// Also those that the peer is told of only on the new road.
TEST(AutoDeath, RegionsComeAndGoWhateverTheRoad) {
  Pair pair;
  std::vector<std::byte> added(page);
  const std::uint32_t number = pair.b.channel->add_region({added.data(), added.size(), page});
  const auto write = [&](std::uint64_t seed) {
    kvferry::testing::fill(pair.a.at(0), seed);
    const std::vector<ConstBuffer> objects{pair.a.at(0)};
    const std::array<std::uint64_t, 1> index{0};
    std::error_code ec;
    (void)pair.a.channel->batched_write(objects, {.peer_id = "b", .remote_indexes = index, .remote_region = number},
                                        ec);
    return ec;
  };
  EXPECT_FALSE(write(1));
  EXPECT_TRUE(kvferry::testing::matches({added.data(), page}, 1));
  pair.fate->die();
  EXPECT_FALSE(write(2));
  EXPECT_TRUE(kvferry::testing::matches({added.data(), page}, 2));
  EXPECT_TRUE(begins(pair.a.path_to("b"), "tcp "));
  pair.b.channel->remove_region(number, long_enough);
  EXPECT_EQ(write(3), errc::region_gone);
  EXPECT_TRUE(kvferry::testing::matches({added.data(), page}, 2));
}

/// Registers and forgets regions, as an adapter's transport does, and may refuse one.
class Registering : public TcpTransferChannel {
 public:
  struct Registry {
    std::vector<std::uint32_t> numbers;
    bool refuses = false;
  };
  Registering(TcpOptions options, std::shared_ptr<Registry> registry)
      : TcpTransferChannel(std::move(options)), registry_(std::move(registry)) {}

 protected:
  void register_region(const LocalRegion& region) override {
    if (registry_->refuses) {
      throw TransferError(std::make_error_code(std::errc::not_enough_memory), "no more of it");
    }
    registry_->numbers.push_back(region.number);
  }
  [[nodiscard]] std::function<void(std::uint32_t)> region_forgetter() override {
    return [registry = registry_](std::uint32_t number) { std::erase(registry->numbers, number); };
  }

 private:
  const std::shared_ptr<Registry> registry_;
};

TEST(AutoRegions, AreRegisteredOnAllRoadsOrOnNone) {
  const std::array registries{std::make_shared<Registering::Registry>(), std::make_shared<Registering::Registry>()};
  std::vector<AutoRoad> both;
  for (std::size_t i = 0; i < registries.size(); ++i) {
    both.push_back({"tcp" + std::to_string(i), [registry = registries[i]](ChannelOptions common) {
                      TcpOptions options;
                      static_cast<ChannelOptions&>(options) = std::move(common);
                      return std::make_unique<Registering>(std::move(options), registry);
                    }});
  }
  Node node(with(both));
  std::vector<std::byte> added(page);
  const MemoryRegion region{added.data(), added.size(), page};
  const std::vector<std::uint32_t> one{node.channel->add_region(region)};
  EXPECT_EQ(registries[0]->numbers, one);
  EXPECT_EQ(registries[1]->numbers, one);
  registries[1]->refuses = true;
  std::error_code ec;
  (void)node.channel->add_region(region, ec);
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  EXPECT_EQ(registries[0]->numbers, one) << "what the first had registered is forgotten";
  node.channel->remove_region(one.front(), long_enough);
  EXPECT_TRUE(registries[0]->numbers.empty());
  EXPECT_TRUE(registries[1]->numbers.empty());
}

/// A write is under way when its road breaks, because the peer has not come to it yet: after the peer's fence it lands
/// no more, and nothing hinders what comes over the other road.
TEST(AutoDeath, AFenceHoldsForWhatWasUnderWayOnAnotherRoad) {
  asio::thread_pool pool(1);
  const auto fate = std::make_shared<Fate>();
  AutoOptions options;
  options.executor = pool.get_executor();
  Node b(std::move(options));
  Node a(with({mortal_shm(fate), tcp()}));
  ASSERT_FALSE(a.connect(b));
  // Behind these, the two have told each other of their regions, and have each other's answers.
  b.channel->fence("a", long_enough);
  a.channel->fence("b", long_enough);
  HeldThread held(pool);
  for (const std::uint64_t index : all_pages) {
    kvferry::testing::fill(a.at(index), 1);
  }
  const std::vector<ConstBuffer> objects{a.at(0), a.at(1), a.at(2), a.at(3)};
  // What has left: the bytes that the peer is to read count before it hears of them.
  const auto told = [&] {
    const auto paths = a.channel->stats().paths;
    const auto headers = std::ranges::find(paths, "shm socket", &PathStats::name);
    EXPECT_NE(headers, paths.end());
    return headers == paths.end() ? std::uint64_t{0} : headers->bytes_out;
  };
  const std::uint64_t told_before = told();
  auto under_way =
      a.channel->async_batched_write(objects, {.peer_id = "b", .remote_indexes = all_pages}, asio::use_future);
  // Had the road died before, it would wait for the other one.
  ASSERT_TRUE(comes_true([&] { return told() > told_before; }));
  fate->die();
  try {
    (void)under_way.get();
    ADD_FAILURE() << "written";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), condition::may_still_land);
  }
  held.let_go();
  b.channel->fence("a", long_enough);
  for (const std::uint64_t index : all_pages) {
    kvferry::testing::fill(b.at(index), 50 + index);
  }
  std::error_code ec;
  const std::vector<std::uint64_t> last{3};
  kvferry::testing::fill(a.at(3), 77);
  // The clocks of the two can't tell whether one that is started at once was started after the fence.
  EXPECT_TRUE(comes_true([&] {
    (void)a.channel->batched_write(std::vector<ConstBuffer>{a.at(3)}, {.peer_id = "b", .remote_indexes = last}, ec);
    return ec != errc::fenced;
  }));
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  for (const std::uint64_t index : {0U, 1U, 2U}) {
    EXPECT_TRUE(kvferry::testing::matches(b.at(index), 50 + index)) << "page " << index;
  }
  EXPECT_TRUE(kvferry::testing::matches(b.at(3), 77));
  b.channel->close();
  pool.join();
}

TEST(AutoDeath, ARestartIsOneEventWhateverTheRoad) {
  const std::string url = kvferry_test::lasting_url();
  AutoOptions first;
  first.peer_init_url = url;
  std::optional<Node> b;
  b.emplace(std::move(first));
  Node a;
  ASSERT_FALSE(a.connect(*b));
  EXPECT_EQ(a.channel->wait_peer_event(long_enough).kind, PeerEventKind::connected);
  b.reset();
  EXPECT_EQ(a.channel->wait_peer_event(long_enough).kind, PeerEventKind::gone);
  AutoOptions options = with({tcp()});
  options.peer_init_url = url;
  b.emplace(std::move(options));
  EXPECT_EQ(a.write(1), errc::peer_restarted);
  EXPECT_FALSE(a.write(2));
  EXPECT_TRUE(b->holds(2));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_EQ(a.channel->wait_peer_event(long_enough).kind, PeerEventKind::restarted);
  std::error_code ec;
  (void)a.channel->wait_peer_event(milliseconds(0), ec);
  EXPECT_EQ(ec, errc::timed_out) << "one event, not one for each road";
  EXPECT_EQ(a.channel->peers().size(), 1U);
}

TEST(AutoDeath, ClosingEndsAnAttemptOnARoadWithoutAnswer) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::silent);
  Node b;
  Node a(with({mortal_shm(fate), tcp()}));
  auto connected =
      a.channel->async_lazy_init_peer_connection("a", "b", b.channel->peer_init_url(), {}, {}, asio::use_future);
  const auto until = std::chrono::steady_clock::now() + long_enough;
  while (fate->waiting() == 0 && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  ASSERT_EQ(fate->waiting(), 1U);
  a.channel->close();
  ASSERT_EQ(connected.wait_for(long_enough), std::future_status::ready);
  try {
    (void)connected.get();
    ADD_FAILURE() << "connected";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::closed);
  }
}

/// Two roads come and go in turn under a writer. A write that succeeded is there, and after a fence nothing of one
/// that failed comes any more, whichever road it was on.
TEST(AutoDeath, OrderAndFencesHoldAcrossRoads) {
  constexpr int least_writes = 300;
  const std::array fates{std::make_shared<Fate>(), std::make_shared<Fate>()};
  const std::vector<AutoRoad> both{mortal_shm(fates[0]), mortal_road<TcpTransferChannel, TcpOptions>("tcp", fates[1])};
  Node b;
  Node a(with(both));
  ASSERT_FALSE(a.connect(b));
  std::atomic<int> started{0};
  std::atomic<bool> stop{false};
  std::thread killer([&] {
    for (unsigned turn = 0; !stop; ++turn) {
      // In the middle of a write, sooner or later.
      for (const int seen = started; started < seen + 3 && !stop;) {
        std::this_thread::yield();
      }
      for (unsigned pause = turn % 64; pause > 0; --pause) {
        std::this_thread::yield();
      }
      fates[(turn + 1) % 2]->set(Fate::State::alive);
      fates[turn % 2]->die();
    }
  });
  int succeeded = 0;
  int fenced = 0;
  const auto until =
      std::chrono::steady_clock::now() + std::chrono::minutes(2);  // a break in the middle of a write is rare
  while (
      (started < least_writes || succeeded == 0 || fenced == 0 || a.bytes_out("shm") == 0 || a.bytes_out("tcp") == 0) &&
      std::chrono::steady_clock::now() < until) {
    ++started;
    const auto seed = static_cast<std::uint64_t>(started) * pages;
    if (const auto ec = a.write(seed); !ec) {
      ++succeeded;
      if (!b.holds(seed)) {
        ADD_FAILURE() << "write " << started;
        break;
      }
    } else if (ec == condition::may_still_land) {
      ++fenced;
      std::error_code late;
      b.channel->fence("a", long_enough, late);
      EXPECT_FALSE(late);
      // The pages are somebody else's now. Connecting takes the time in which something late would come.
      std::ranges::fill(b.memory, std::byte{0xEE});
      std::ignore = a.connect(b);
      EXPECT_TRUE(std::ranges::all_of(b.memory, [](std::byte one) { return one == std::byte{0xEE}; })) << started;
    }
  }
  stop = true;
  killer.join();
  RecordProperty("fenced", fenced);
  EXPECT_GT(succeeded, 0);
  EXPECT_GT(fenced, 0);
  EXPECT_GT(a.bytes_out("shm"), 0U);
  EXPECT_GT(a.bytes_out("tcp"), 0U);
  for (const auto& fate : fates) {
    fate->set(Fate::State::alive);
  }
  a.channel->disconnect("b");
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "shm ")) << a.path_to("b");
  EXPECT_FALSE(a.write(7));
  EXPECT_TRUE(b.holds(7));
}

}  // namespace
}  // namespace kvferry::roads::testing
