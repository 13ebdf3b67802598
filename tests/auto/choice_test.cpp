// SPDX-License-Identifier: Apache-2.0
// The choice of a road, how it is reported, and what isn't done in its place.
#include <gtest/gtest.h>

#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/auto/road_offers.hpp>
#include <kvferry/error.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "auto_node.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::roads::testing {
namespace {

using std::chrono::milliseconds;

TEST(AutoChoice, TheFirstThatBothHaveCarriesEverything) {
  Node b;
  Node a;
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "shm process ")) << a.path_to("b");
  EXPECT_TRUE(begins(b.path_to("a"), "shm process ")) << b.path_to("a");
  EXPECT_FALSE(has(a.path_to("b"), "not "));
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  EXPECT_GT(a.bytes_out("shm"), pages * page);
  EXPECT_EQ(a.bytes_out("tcp"), 0U);
  EXPECT_EQ(a.channel->stats().transport, "auto");
}

TEST(AutoChoice, ASingleRoadIsPinned) {
  Node b;
  Node a(with({tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_FALSE(has(a.path_to("b"), "not ")) << a.path_to("b");
  EXPECT_TRUE(has(b.path_to("a"), "not shm: the peer doesn't offer it")) << b.path_to("a");
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  EXPECT_GT(a.bytes_out("tcp"), pages * page);
}

TEST(AutoChoice, TwoRoadsOfOneTransportAreToldApartByTheirNames) {
  const std::vector<AutoRoad> two{road<TcpTransferChannel>("left", TcpOptions()),
                                  road<TcpTransferChannel>("right", TcpOptions())};
  Node b(with({two[1]}));
  Node a(with(two));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_TRUE(has(a.path_to("b"), "; road right; not left: the peer doesn't offer it")) << a.path_to("b");
  EXPECT_FALSE(a.write(1));
  EXPECT_GT(a.bytes_out("right"), pages * page);
  EXPECT_EQ(a.bytes_out("left"), 0U);
}

TEST(AutoChoice, TheOrderIsThatOfTheSideThatConnects) {
  Node b(with({shm(), tcp()}));
  Node a(with({tcp(), shm()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_TRUE(begins(b.path_to("a"), "tcp ")) << b.path_to("a");
  // For the other side that is a fallback.
  EXPECT_FALSE(has(a.path_to("b"), "not ")) << a.path_to("b");
  EXPECT_TRUE(has(b.path_to("a"), "; not shm: the peer prefers tcp")) << b.path_to("a");
  EXPECT_TRUE(b.warned("path_chosen: road tcp; not shm: the peer prefers tcp"));
  EXPECT_EQ(a.channel->stats().roads.at(0).fallbacks, 0U);
  EXPECT_EQ(b.channel->stats().roads.at(1).fallbacks, 1U);
}

TEST(AutoChoice, ThePeersBetterRoadIsNoFallbackWhereItIsNotTheBetterOne) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  Node b(with({tcp(), shm()}));
  Node a(with({mortal_shm(fate), tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(has(a.path_to("b"), "; not shm: nobody is there")) << a.path_to("b");
  EXPECT_TRUE(begins(b.path_to("a"), "tcp ") && !has(b.path_to("a"), "not ")) << b.path_to("a");
  EXPECT_FALSE(b.warned("path_chosen"));
  EXPECT_EQ(a.channel->stats().roads.at(1).fallbacks, 1U);
  EXPECT_EQ(b.channel->stats().roads.at(0).fallbacks, 0U);
}

TEST(AutoChoice, WhyTheBetterOneIsNotTakenIsSaidByBothSides) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  Node b;
  Node a(with({mortal_shm(fate), tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "tcp ")) << a.path_to("b");
  EXPECT_TRUE(has(a.path_to("b"), "; not shm: nobody is there")) << a.path_to("b");
  EXPECT_TRUE(has(b.path_to("a"), "; not shm: the peer did not come on it")) << b.path_to("a");
  EXPECT_TRUE(a.warned("path_chosen: road tcp; not shm: nobody is there"));
  EXPECT_TRUE(b.warned("path_chosen: road tcp; not shm: the peer did not come on it"));
}

/// Its links break as soon as they are made, so that the channel refuses them.
class Breaking : public TcpTransferChannel {
 public:
  Breaking(TcpOptions options, std::shared_ptr<std::atomic<int>> made)
      : TcpTransferChannel(std::move(options)), made_(std::move(made)) {}
  ~Breaking() override { close(); }

 protected:
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override {
    auto breaking = [host, made = made_, on_link = std::move(on_link)](
                        std::error_code ec, std::shared_ptr<kit::Link> link, std::string diagnostic) {
      if (link) {
        ++*made;
        host->link_failed(*link, errc::connection_lost);
      }
      on_link(ec, std::move(link), std::move(diagnostic));
    };
    return TcpTransferChannel::accept(std::move(host), remote_endpoint, deadline, std::move(breaking));
  }

 private:
  const std::shared_ptr<std::atomic<int>> made_;
};

TEST(AutoChoice, ALinkThatTheChannelRefusesCountsForNoRoad) {
  const auto made = std::make_shared<std::atomic<int>>(0);
  const AutoRoad breaking{"tcp", [made](ChannelOptions common) {
                            TcpOptions options;
                            static_cast<ChannelOptions&>(options) = std::move(common);
                            return std::make_unique<Breaking>(std::move(options), made);
                          }};
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  Node b(with({shm(), breaking}));
  Node a(with({mortal_shm(fate), tcp()}));
  auto connected = a.begin_connect(b);
  ASSERT_TRUE(comes_true([&] { return made->load() > 0; }));
  a.channel->close();
  ASSERT_EQ(connected.wait_for(long_enough), std::future_status::ready);
  b.channel->close();  // who was under way there has ended
  EXPECT_EQ(b.channel->stats().handshakes.accepted, 0U);
  EXPECT_EQ(b.channel->stats().roads.at(1).taken, 0U);
  EXPECT_EQ(b.channel->stats().roads.at(1).fallbacks, 0U);
  EXPECT_FALSE(b.warned("path_chosen"));

  Node c(with({shm(), tcp()}));
  Node d(with({shm(), tcp()}));
  ASSERT_FALSE(d.connect(c));
  EXPECT_EQ(c.channel->stats().roads.at(0).taken, 1U);
  EXPECT_EQ(d.channel->stats().roads.at(0).taken, 1U);
}

/// Also before anybody connects.
TEST(AutoChoice, ARoadThatThisHostDoesNotHaveIsLeftOutAndSaidSo) {
  const AutoRoad missing{"warp", [](ChannelOptions) -> std::unique_ptr<kit::TransferChannelKit> {
                           throw TransferError(std::make_error_code(std::errc::no_such_device), "no warp drive here");
                         }};
  Node b(with({missing, tcp()}));
  EXPECT_TRUE(b.warned("road_unavailable: no road warp: no warp drive here"));
  Node a(with({mortal_road<TcpTransferChannel, TcpOptions>("warp", std::make_shared<Fate>()), tcp()}));
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(has(a.path_to("b"), "not warp: no warp drive here")) << a.path_to("b");
  EXPECT_TRUE(has(b.path_to("a"), "not warp: no warp drive here")) << b.path_to("a");

  EXPECT_EQ(failure_of(with({missing, tcp()}, {"warp"})).code, errc::no_path);
  EXPECT_TRUE(has(failure_of(with({missing})).sentence, "no warp drive here"));
}

TEST(AutoChoice, NamesAreChecked) {
  const auto invalid = std::make_error_code(std::errc::invalid_argument);
  EXPECT_EQ(failure_of(with({tcp(), tcp()})).code, invalid);
  EXPECT_EQ(failure_of(with({road<TcpTransferChannel>("", TcpOptions())})).code, invalid);
  EXPECT_EQ(failure_of(with({road<TcpTransferChannel>("a\nb", TcpOptions())})).code, invalid);
  EXPECT_EQ(failure_of(with({tcp()}, {"shm"})).code, invalid);
  EXPECT_EQ(failure_of(with({tcp(), {"nothing", nullptr}})).code, invalid);
  std::vector<AutoRoad> many;
  for (int i = 0; i < 17; ++i) {
    many.push_back(road<TcpTransferChannel>("tcp" + std::to_string(i), TcpOptions()));
  }
  EXPECT_EQ(failure_of(with(many)).code, invalid);
}

TEST(AutoRequire, WhatIsRequiredIsTakenOrNothing) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::unreachable);
  Node b;
  Node a(with({mortal_shm(fate), tcp()}, {"shm"}));
  std::string why;
  EXPECT_EQ(a.connect(b, &why), errc::no_path);
  EXPECT_TRUE(has(why, "not shm: nobody is there")) << why;
  EXPECT_EQ(a.bytes_out("tcp"), 0U);
  fate->set(Fate::State::alive);
  ASSERT_FALSE(a.connect(b));
  EXPECT_FALSE(a.write(1));
  fate->die();
  EXPECT_EQ(a.write(2), errc::no_path) << "rather than over TCP";
  EXPECT_FALSE(a.channel->peer_info("b"));
}

TEST(AutoRequire, WhatThePeerRequiresHoldsAsWell) {
  Node b(with({shm(), tcp()}, {"shm"}));
  Node a(with({tcp()}));
  std::string why;
  EXPECT_EQ(a.connect(b, &why), errc::no_path);
  EXPECT_TRUE(has(why, "not shm: the peer doesn't offer it")) << why;
}

TEST(AutoChoice, ARoadWithoutAnswerLeavesTimeForTheNext) {
  const auto fate = std::make_shared<Fate>();
  fate->set(Fate::State::silent);
  Node b;
  AutoOptions options = with({mortal_shm(fate), tcp()});
  options.road_timeout = std::chrono::minutes(1);  // half of the call's time is less
  Node a(std::move(options));
  ASSERT_FALSE(a.connect(b, nullptr, long_enough / 4));
  EXPECT_TRUE(has(a.path_to("b"), "; not shm: nobody answered")) << a.path_to("b");
}

TEST(AutoChoice, ChannelsOfOneTransportAreToldThatThisIsAnother) {
  Node b;
  TcpTransferChannel plain{TcpOptions()};
  std::error_code ec;
  (void)plain.lazy_init_peer_connection("plain", "b", b.channel->peer_init_url(), {}, {}, ec);
  EXPECT_EQ(ec, errc::transport_mismatch);
}

TEST(AutoChoice, KeysSecureTheOneHandshakeOfAllRoads) {
  const KeyPair a_keys = make_key_pair();
  const KeyPair b_keys = make_key_pair();
  AutoOptions a_options;
  a_options.keyring = std::make_shared<Keyring>(a_keys, std::vector<PeerKey>{{"b", b_keys.public_key}});
  AutoOptions b_options;
  b_options.keyring = std::make_shared<Keyring>(b_keys, std::vector<PeerKey>{{"a", a_keys.public_key}});
  Node b(std::move(b_options));
  Node a(std::move(a_options));
  Node stranger;
  ASSERT_FALSE(a.connect(b));
  EXPECT_TRUE(begins(a.path_to("b"), "shm process "));
  EXPECT_EQ(stranger.connect(b), errc::authentication_failed);
}

/// A transport that answers attempts where it may take its time, or has no room for them. There is one of each number.
template <int number>
class Elsewhere : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;
  ~Elsewhere() override { stop_answering(); }

  static inline std::atomic<bool> has_room{true};

 protected:
  [[nodiscard]] bool run_accept(const std::string&, std::size_t, std::function<void()> answer) override {
    if (has_room) {
      answering_.push_back(std::async(std::launch::async, std::move(answer)));
    }
    return has_room;
  }
  void stop_listening() override {
    stop_answering();
    TcpTransferChannel::stop_listening();
  }

 private:
  void stop_answering() { answering_.clear(); }

  std::vector<std::future<void>> answering_;
};

TEST(AutoChoice, AnswersAreMadeWhereARoadTakesItsTime) {
  Node b(with({shm(), road<Elsewhere<0>>("tcp", TcpOptions())}));
  Node a;
  ASSERT_FALSE(a.connect(b));
  EXPECT_FALSE(a.write(1));
  EXPECT_TRUE(b.holds(1));
  a.channel->disconnect("b");
  Elsewhere<0>::has_room = false;
  EXPECT_EQ(a.connect(b), errc::resource_limit);
  Elsewhere<0>::has_room = true;
}

TEST(AutoChoice, OneOfThemDecidesWhetherThereIsRoomForAnAnswer) {
  Node b(with({road<Elsewhere<0>>("one", TcpOptions()), road<Elsewhere<1>>("two", TcpOptions())}));
  Node a(with({tcp_named("one"), tcp_named("two")}));
  Elsewhere<0>::has_room = false;
  EXPECT_FALSE(a.connect(b)) << "two has it on a thread of its own already";
  a.channel->disconnect("b");
  Elsewhere<1>::has_room = false;
  EXPECT_EQ(a.connect(b), errc::resource_limit);
  Elsewhere<0>::has_room = true;
  Elsewhere<1>::has_room = true;
}

/// With its hooks, to hear what it would say to peers elsewhere.
class Open : public AutoTransferChannel {
 public:
  using AutoTransferChannel::accept;
  using AutoTransferChannel::AutoTransferChannel;
  using AutoTransferChannel::dial;
};

TEST(AutoHosts, ARoadWithinAHostIsNotTakenToAnother) {
  AutoOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  Open channel(std::move(options));
  const auto dial = channel.dial("b");
  std::error_code ec;
  auto asked = kit::decode_endpoint<RoadOffers>(dial->local_endpoint(), ec);
  ASSERT_FALSE(ec);
  ASSERT_EQ(asked.roads.size(), 2U);
  ASSERT_FALSE(asked.host.empty());
  const auto host = std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{});
  const auto deadline = kit::Clock::now() + long_enough;
  const auto ignore = [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {};

  const auto here =
      kit::decode_endpoint<RoadOffers>(channel.accept(host, kit::encode_endpoint(asked), deadline, ignore), ec);
  EXPECT_EQ(here.host, asked.host);
  EXPECT_TRUE(here.roads.at(0).why.empty());

  const std::string this_host = std::exchange(asked.host, "another one");
  const auto there =
      kit::decode_endpoint<RoadOffers>(channel.accept(host, kit::encode_endpoint(asked), deadline, ignore), ec);
  EXPECT_TRUE(there.host.empty()) << "nobody elsewhere is told this host's";
  EXPECT_EQ(there.roads.at(0).why, "the peer is on another host");
  EXPECT_TRUE(there.roads.at(1).why.empty());

  // Nor when the other says that it could be.
  RoadOffers answer = here;
  answer.host.clear();
  answer.roads.pop_back();
  std::promise<kit::Failure> ended;
  dial->connect(host, kit::encode_endpoint(answer), deadline,
                [&](std::error_code cause, const std::shared_ptr<kit::Link>&, const std::string& why) {
                  ended.set_value({cause, why});
                });
  const auto failure = ended.get_future().get();
  EXPECT_EQ(failure.code, errc::no_path);
  EXPECT_TRUE(has(failure.sentence, "not shm: the peer is on another host; not tcp: the peer doesn't offer it"))
      << failure.sentence;
}

TEST(AutoHosts, ARoadWithinAHostIsJudgedByTheHostBeforeAnythingElse) {
  AutoRoad missing{"shm", [](ChannelOptions) -> std::unique_ptr<kit::TransferChannelKit> {
                     throw TransferError(std::make_error_code(std::errc::no_such_device), "no memory here");
                   }};
  missing.within_host = true;
  const auto open = [](std::vector<AutoRoad> roads) {
    AutoOptions options = with(std::move(roads));
    options.peer_init_url = kvferry::testing::own_loopback_url();
    return options;
  };
  Open both(open({shm(), tcp()}));
  Open lacks(open({missing, tcp()}));
  const auto host = std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{});
  const auto deadline = kit::Clock::now() + long_enough;
  const auto ignore = [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {};
  std::error_code ec;
  const auto dial = both.dial("b");
  auto asked = kit::decode_endpoint<RoadOffers>(dial->local_endpoint(), ec);
  ASSERT_FALSE(ec);
  asked.host = "another one";

  // This host doesn't have it.
  const auto answer =
      kit::decode_endpoint<RoadOffers>(lacks.accept(host, kit::encode_endpoint(asked), deadline, ignore), ec);
  EXPECT_EQ(answer.roads.at(0).why, "the peer is on another host");

  // The peer doesn't offer it.
  asked.roads.erase(asked.roads.begin());
  asked.roads.front().why = "not today";
  try {
    (void)both.accept(host, kit::encode_endpoint(asked), deadline, ignore);
    FAIL() << "there is no road";
  } catch (const TransferError& error) {
    EXPECT_TRUE(has(error.what(), "not shm: the peer is on another host; not tcp: not today")) << error.what();
  }

  // Of the side that connects, too.
  std::promise<std::string> ended;
  const auto other_dial = lacks.dial("b");
  other_dial->connect(host, kit::encode_endpoint(RoadOffers()), deadline,
                      [&](std::error_code, const std::shared_ptr<kit::Link>&, const std::string& why) {
                        ended.set_value(why);
                      });
  const std::string why = ended.get_future().get();
  EXPECT_TRUE(has(why, "not shm: the peer is on another host; not tcp: the peer doesn't offer it")) << why;
}

/// A peer that says that it is on this host, and doesn't come, gets no more than a part of the descriptors.
/// A channel whose system has no name for its host: a sandbox may have a part of /proc (ProcSubset=pid of systemd's).
/// @return null where this process may not mount anything.
std::unique_ptr<Node> node_of_an_unnamed_host() {
  std::unique_ptr<Node> made;
  std::thread([&] {  // what it mounts is for this thread alone
    if (::unshare(CLONE_FS | CLONE_NEWNS) == 0 && ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
        ::mount("none", "/proc/sys/kernel/random", "tmpfs", 0, nullptr) == 0) {
      made = std::make_unique<Node>();
    }
  })
      .join();
  return made;
}

TEST(AutoHosts, ThatASystemHasNoNameForAreNotSaidToBeOthers) {
  const auto unnamed = node_of_an_unnamed_host();
  if (!unnamed) {
    GTEST_SKIP() << "this process may not mount anything";
  }
  const std::string here = "not shm: this host can't be told from others: no /proc/sys/kernel/random/boot_id";
  const std::string there =
      "not shm: the peer can't tell its host from others: no /proc/sys/kernel/random/boot_id there";
  const auto expect_told = [](Node& node, const char* peer, const std::string& why) {
    EXPECT_TRUE(begins(node.path_to(peer), "tcp ")) << node.path_to(peer);
    EXPECT_TRUE(has(node.path_to(peer), why)) << node.path_to(peer);
    const std::lock_guard lock(node.mutex);
    EXPECT_TRUE(std::ranges::any_of(node.warnings, [&](const std::string& warning) { return has(warning, why); }))
        << "nobody is warned";
  };
  for (const bool unnamed_connects : {true, false}) {
    Node named;
    ASSERT_FALSE(unnamed_connects ? unnamed->connect(named) : named.connect(*unnamed));
    expect_told(named, unnamed_connects ? "a" : "b", there);
    expect_told(*unnamed, unnamed_connects ? "b" : "a", here);
  }
}

TEST(AutoHosts, SocketsWithinTheHostAreBounded) {
  rlimit before{};
  ::getrlimit(RLIMIT_NOFILE, &before);
  rlimit few = before;
  few.rlim_cur = 256;
  ::setrlimit(RLIMIT_NOFILE, &few);
  AutoOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  Open channel(std::move(options));
  ::setrlimit(RLIMIT_NOFILE, &before);
  const auto ignore = [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {};
  const auto question = channel.dial("b")->local_endpoint();
  std::vector<std::shared_ptr<tcp::testing::Host>> hosts;
  const auto ask = [&] {
    hosts.push_back(std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}));
    std::error_code ec;
    auto answer = kit::decode_endpoint<RoadOffers>(
        channel.accept(hosts.back(), question, kit::Clock::now() + long_enough, ignore), ec);
    EXPECT_FALSE(ec);
    return answer.roads.at(0);
  };
  for (int i = 0; i < 24; ++i) {
    ASSERT_TRUE(ask().why.empty()) << i;
  }
  const RoadOffer last = ask();
  EXPECT_EQ(last.name, "shm");
  EXPECT_TRUE(has(last.why, "24 connections are awaited of one address")) << last.why;
  EXPECT_EQ(last.failure().code, errc::resource_limit);
}

TEST(AutoHosts, SenselessRoadsAreRefused) {
  AutoOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  Open channel(std::move(options));
  const auto host = std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{});
  const auto ignore = [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {};
  const auto deadline = kit::Clock::now() + long_enough;
  EXPECT_THROW((void)channel.accept(host, Bytes(3), deadline, ignore), TransferError);
  EXPECT_THROW(channel.dial("b")->connect(host, Bytes(3), deadline, ignore), TransferError);
  // One name twice is one road, and what nobody here has is none.
  const RoadOffers asked{{}, {{"tcp", Bytes(3), {}}, {"tcp", Bytes(3), {}}, {"warp", {}, {}}}};
  EXPECT_THROW((void)channel.accept(host, kit::encode_endpoint(asked), deadline, ignore), TransferError);
}

}  // namespace
}  // namespace kvferry::roads::testing
