// SPDX-License-Identifier: Apache-2.0
// Channels that come, go, and meet, in many orders.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "handshakes.hpp"
#include "pair.hpp"
#include "sides.hpp"

namespace kvferry::inline KVFERRY_ABI::schedules {
namespace {

TEST(Peers, TwoThatDialEachOtherAtOnceAreConnected) {
  explore(
      300,
      [] {
        const auto a = std::make_shared<Side>(options_of(1 + dice(2)));
        const auto b = std::make_shared<Side>(options_of(1 + dice(2)));
        User of_a(a, "b");
        User of_b(b, "a");
        const auto call_and_write = [](User& user, const std::string& id, const std::shared_ptr<Side>& peer) {
          const auto connecting = user.connect(id, peer->channel->peer_init_url(), enough);
          user.finish();
          EXPECT_FALSE(connecting->ec) << connecting->ec.message();
          const auto writing = user.transfer(TransferKind::write, peer, 2, enough);
          user.finish();
          EXPECT_FALSE(writing->ec) << writing->ec.message();
        };
        std::thread other([&] { call_and_write(of_b, "b", a); });
        call_and_write(of_a, "a", b);
        other.join();
        a->channel.reset();
        b->channel.reset();
        EXPECT_EQ(open_sockets(), 0U);
      },
      steady_time);
}

TEST(Peers, TwoThatDialEachOtherAnewAtOnceAreConnectedAgain) {
  explore(
      300,
      [] {
        const auto a = std::make_shared<Side>(options_of(1));
        const auto b = std::make_shared<Side>(options_of(1));
        User of_a(a, "b");
        User of_b(b, "a");
        const auto call = [](User& user, const std::string& id, const std::shared_ptr<Side>& peer) {
          const auto connecting = user.connect(id, peer->channel->peer_init_url(), enough);
          user.finish();
          EXPECT_FALSE(connecting->ec) << connecting->ec.message();
        };
        for (int round = 0; round < 4; ++round) {
          std::thread other([&] { call(of_b, "b", a); });
          call(of_a, "a", b);
          other.join();
          std::error_code ignored;
          if (dice(2) == 0) {
            a->channel->disconnect("b", ignored);
          } else {
            b->channel->disconnect("a", ignored);
          }
        }
        a->channel.reset();
        b->channel.reset();
        EXPECT_EQ(open_sockets(), 0U);
      },
      steady_time);
}

TEST(Peers, ACallForAConnectionEndsOnceWhateverHappensToBoth) {
  explore(
      400,
      [] {
        const auto a = std::make_shared<Side>(options_of(1 + dice(2)));
        const auto b = std::make_shared<Side>(options_of(1));
        User of_a(a, "b");
        User of_b(b, "a");
        lose_handshake_messages(dice(3));
        std::thread other([&] {
          if (dice(2) == 0) {
            (void)of_b.connect("b", a->channel->peer_init_url(), milliseconds(200));
          }
          if (dice(2) == 0) {
            cut_connections();
          }
          if (dice(3) == 0) {
            (dice(2) == 0 ? a : b)->channel->close();
          }
          of_b.finish();
        });
        const auto first = of_a.connect("a", b->channel->peer_init_url(), milliseconds(100));
        const auto second = of_a.connect("a", b->channel->peer_init_url(), milliseconds(500));
        of_a.look();
        if (dice(2) == 0) {
          User::cancel(*first);
        }
        of_a.finish();
        other.join();
        lose_handshake_messages(0);
        a->channel.reset();
        b->channel.reset();
        EXPECT_EQ(open_sockets(), 0U);
      },
      leaping_time);
}

TEST(Peers, APeerIsReplacedWhileItIsWrittenTo) {
  explore(
      300,
      [] {
        Pair pair(1 + dice(2));
        const auto before = pair.b;
        std::shared_ptr<Side> after;
        std::thread restarting([&] {
          TcpOptions options = options_of(2);
          options.peer_init_url = before->channel->peer_init_url();
          before->channel.reset();
          after = std::make_shared<Side>(options);
        });
        // Pages are those of whom this side knows.
        std::shared_ptr<Side> known = before;
        for (int i = 0; i < 8; ++i) {
          const auto call =
              pair.of_a.transfer(dice(2) == 0 ? TransferKind::write : TransferKind::read, known, 2, enough);
          pair.of_a.finish();
          EXPECT_NE(call->ec, errc::timed_out);
          if (call->ec == errc::peer_restarted) {
            EXPECT_EQ(known, before) << "told twice";
            restarting.join();
            known = after;
          }
        }
        if (known == before) {
          restarting.join();
        }
        for (int tries = 0; tries < 3 && known != after; ++tries) {
          const auto call = pair.of_a.transfer(TransferKind::write, known, 2, enough);
          pair.of_a.finish();
          known = call->ec == errc::peer_restarted ? after : known;
        }
        EXPECT_EQ(known, after);
        const auto call = pair.of_a.transfer(TransferKind::write, after, 2, enough);
        pair.of_a.finish();
        EXPECT_FALSE(call->ec) << call->ec.message();
        after->channel.reset();
        after->expect_quiet();
      },
      steady_time);
}

TEST(Peers, AStrangerDoesNotTakeTheNameOfOneThatLives) {
  explore(
      200,
      [] {
        Pair pair;
        const auto stranger = std::make_shared<Side>(options_of(1));
        User of_stranger(stranger, "b");
        std::thread other([&] {
          const auto call = of_stranger.connect("a", pair.b->channel->peer_init_url(), enough);
          of_stranger.finish();
          EXPECT_EQ(call->ec, errc::identity_conflict) << call->ec.message();
        });
        for (int i = 0; i < 3; ++i) {
          const auto call = pair.write(2);
          pair.of_a.finish();
          EXPECT_FALSE(call->ec) << call->ec.message();
        }
        other.join();
        stranger->channel.reset();
      },
      steady_time);
}

/// Calls of every kind, of which one is cancelled on its user's thread while the channel is being destroyed on another.
TEST(Peers, ACallIsCancelledWhileItsChannelGoes) {
  explore(400, [] {
    auto a = std::make_unique<Side>(options_of(1));
    const auto b = std::make_shared<Side>(options_of(1));
    a->channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
    std::map<std::uint64_t, int> received;
    User user(std::shared_ptr<Side>(a.get(), [](Side*) {}), "b");
    std::shared_ptr<Call> call;
    switch (dice(4)) {
      case 0: call = user.fence(enough); break;
      case 1: call = user.receive_notification(enough, received); break;
      case 2: call = user.connect("a", "tcp://127.0.0.1:1", enough); break;
      default: call = user.transfer(TransferKind::write, b, 2, enough); break;
    }
    std::thread users([&] {
      if (call->ends == 0) {
        User::cancel(*call);
      }
      user.finish();
    });
    a.reset();
    users.join();
    EXPECT_EQ(call->ends, 1);
    b->channel.reset();
    EXPECT_EQ(open_sockets(), 0U);
  });
}

}  // namespace
}  // namespace kvferry::schedules
