// SPDX-License-Identifier: Apache-2.0
// Two channels whose users call whatever comes to mind, in turns that a seed decides, while connections are cut and one of
// the channels is replaced.
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>

#include "handshakes.hpp"
#include "sides.hpp"

namespace kvferry::inline KVFERRY_ABI::schedules {
namespace {

TcpOptions any_options() {
  TcpOptions options;
  options.log_sink = [](const LogRecord&) {};
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.lanes_per_peer = 1 + dice(3);
  options.io_threads = 1 + dice(2);
  options.stripe_threshold = 2 * page_size;
  options.drain_timeout = milliseconds(50);
  if (dice(2) == 0) {
    options.poll = PollPolicy::never();
  }
  return options;
}

/// The events that happen to channels from outside.
enum class Weather { calm, rough };

struct World {
  explicit World(Weather of) : weather(of) {}

  /// A few calls of any kind, some of which are cancelled.
  void use(User& user, std::shared_ptr<Side> World::*peer, int calls) {
    for (int i = 0; i < calls; ++i) {
      const bool hasty = weather == Weather::rough && dice(4) == 0;
      const milliseconds timeout = hasty ? milliseconds(dice(30)) : milliseconds(2000);
      std::shared_ptr<Call> call;
      switch (dice(11)) {
        case 8:
          call = user.blocking_transfer(TransferKind::write, this->*peer, 1 + dice(6), timeout, ++notifications);
          break;
        case 9: call = user.blocking_transfer(TransferKind::read, this->*peer, 1 + dice(6), timeout); break;
        case 10:
          if (weather == Weather::rough) {
            call = user.pair_up(dice(2) == 0 ? TransferKind::send : TransferKind::recv, dice(2),
                                milliseconds(10 + dice(100)));
          }
          break;
        case 0:
        case 1:
        case 2: call = user.transfer(TransferKind::write, this->*peer, 1 + dice(6), timeout, ++notifications); break;
        case 3: call = user.transfer(TransferKind::write, this->*peer, 1 + dice(6), timeout); break;
        case 4:
        case 5: call = user.transfer(TransferKind::read, this->*peer, 1 + dice(6), timeout); break;
        case 6: call = user.fence(timeout); break;
        default:
          if (weather == Weather::rough) {
            call = user.receive_notification(timeout, received);
          }
          break;
      }
      if (call && call->ends == 0 && weather == Weather::rough && dice(4) == 0) {
        if (dice(2) == 0) {
          user.look();
        }
        User::cancel(*call);
      }
      if (dice(3) == 0) {
        user.look();
      }
    }
    user.finish();
  }

  void drain(Side& side) {
    while (!closed.contains(&side) && side.channel->stats().pending_notifications != 0) {
      std::error_code ec;
      const auto notification = side.channel->receive_notification(milliseconds(1), ec);
      EXPECT_FALSE(ec) << ec.message();
      ++received[User::number_of(notification)];
    }
  }

  Weather weather;
  std::shared_ptr<Side> a;
  std::shared_ptr<Side> b;
  std::uint64_t notifications = 0;
  std::map<std::uint64_t, int> received;
  std::set<Side*> closed;  ///< What they had got and not handed out is lost.
};

void use_both(Weather weather, bool lateness) {
  World world(weather);
  world.a = std::make_shared<Side>(any_options());
  world.b = std::make_shared<Side>(any_options());
  world.a->channel->lazy_init_peer_connection("a", "b", world.b->channel->peer_init_url());
  User of_a(world.a, "b");
  User of_b(world.b, "a");
  if (lateness) {
    of_a.lateness = milliseconds(55);
    of_b.lateness = milliseconds(55);
  }
  std::thread first([&] { world.use(of_a, &World::b, 8); });
  std::thread second([&] { world.use(of_b, &World::a, 8); });
  if (weather == Weather::rough && dice(2) == 0) {
    cut_connections();
  }
  if (weather == Weather::rough && dice(3) == 0) {
    world.closed.insert(world.b.get());
    world.b->channel->close();
  }
  first.join();
  second.join();
  world.drain(*world.a);
  world.drain(*world.b);
  std::map<std::uint64_t, int> taken;
  for (User* const user : {&of_a, &of_b}) {
    for (const auto& call : user->calls()) {
      EXPECT_TRUE(call->got == 0 || ++taken[call->got] == 1) << "two recvs have got the same send";
    }
  }
  for (User* const user : {&of_a, &of_b}) {
    for (const auto& call : user->calls()) {
      if (weather == Weather::calm) {
        EXPECT_FALSE(call->ec) << call->ec.message();
      }
      EXPECT_TRUE(call->sent == 0 || call->ec || taken[call->sent] == 1 || world.closed.size() == 1)
          << "a send succeeded that nobody received";
      if (call->notification != 0) {
        EXPECT_LE(world.received[call->notification], 1);
        EXPECT_TRUE(call->ec || world.closed.contains(call->peer.get()) || world.received[call->notification] == 1)
            << "a notification was lost";
      }
    }
  }
  world.a->channel.reset();
  world.b->channel.reset();
  world.a->expect_quiet();
  world.b->expect_quiet();
  EXPECT_EQ(open_sockets(), 0U);
}

TEST(Channels, AllCallsSucceedInCalmWeather) {
  explore(
      300, [] { use_both(Weather::calm, true); }, steady_time);
}

TEST(Channels, EveryCallEndsOnceAndInTimeInRoughWeather) {
  explore(
      500, [] { use_both(Weather::rough, true); }, steady_time);
}

TEST(Channels, EveryCallEndsOnceWhenTimeJumps) {
  explore(500, [] { use_both(Weather::rough, false); });
}

TEST(Channels, ARoundIsTheSameWheneverItIsRun) {
  std::vector<Outcome> rounds;
  for (int again = 0; again < 2; ++again) {
    for (std::uint64_t seed = 1; seed <= 60; ++seed) {
      rounds.push_back(Scheduler(seed, {}).run([] { use_both(Weather::rough, false); }));
    }
  }
  for (std::size_t i = 0; i < rounds.size() / 2; ++i) {
    const Outcome& again = rounds[i + rounds.size() / 2];
    EXPECT_EQ(rounds[i].steps, again.steps) << "seed " << i + 1;
    EXPECT_EQ(rounds[i].trace, again.trace) << "seed " << i + 1;
    EXPECT_EQ(rounds[i].passed, again.passed) << "seed " << i + 1;
  }
}

}  // namespace
}  // namespace kvferry::schedules
