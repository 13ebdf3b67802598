// SPDX-License-Identifier: Apache-2.0
// Moments in the life of two channels that a clock on the wall reaches once in a while: each is tried in many orders.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>

#include "handshakes.hpp"
#include "pair.hpp"
#include "sides.hpp"

namespace kvferry::inline KVFERRY_ABI::schedules {
namespace {

/// Ends that were seen, by what there was to be seen. A test that never saw one of them tested nothing.
class Seen {
 public:
  explicit Seen(std::vector<std::error_code> expected) : expected_(std::move(expected)) {}
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;
  ~Seen() {
    for (const auto& code : all_is_seen() ? expected_ : std::vector<std::error_code>()) {
      EXPECT_GT(counts_[code], 0) << "never seen: " << code.message();
    }
  }
  void note(std::error_code code) {
    ++counts_[code];
    EXPECT_NE(std::ranges::find(expected_, code), expected_.end()) << code.message();
  }

 private:
  const std::vector<std::error_code> expected_;
  std::map<std::error_code, int> counts_;
};

TEST(Moments, TheDeadlineFiresWhileTheCompletionIsBeingDelivered) {
  Seen seen({{}, errc::timed_out, errc::timed_out_in_flight});
  explore(
      1500,  // the rarest of these ends is seen once in some hundred rounds
      [&] {
        Pair pair;
        const auto call = pair.write(3, milliseconds(dice(2)));
        pair.of_a.finish();
        seen.note(call->ec);
        pair.expect_usable();
      },
      leaping_time);
}

TEST(Moments, ACancellationComesBetweenTheStartAndTheFirstByte) {
  Seen seen({{}, errc::cancelled});
  explore(
      400,
      [&] {
        Pair pair(2);
        if (dice(2) == 0) {
          cut_connections();
        }
        const auto call = pair.write(4);
        if (dice(2) == 0) {
          pair.of_a.look();
        }
        User::cancel(*call);
        pair.of_a.finish();
        seen.note(call->ec == condition::peer_failed ? std::error_code(errc::cancelled) : call->ec);
        pair.expect_usable();
      },
      steady_time);
}

TEST(Moments, AChannelIsClosedWhileItReconnects) {
  explore(400, [] {
    Pair pair(1 + dice(2));
    cut_connections();
    lose_handshake_messages(dice(3));
    const auto call = pair.write(2);
    std::thread closing([&] { (dice(2) == 0 ? pair.a : pair.b)->channel->close(); });
    pair.of_a.finish();
    closing.join();
  });
}

TEST(Moments, TheAnswerArrivesInTheStepInWhichTheDrainTimerFires) {
  Seen seen({{}, errc::cancelled, errc::cancelled_in_flight});
  explore(
      800,
      [&] {
        Pair pair;
        const auto call = pair.write(4);
        User::cancel(*call);
        pair.of_a.finish();
        seen.note(call->ec);
        pair.expect_usable();
      },
      leaping_time);
}

TEST(Moments, ANotificationArrivesWhileItsReceiverIsBeingCancelled) {
  explore(
      400,
      [] {
        Pair pair;
        std::map<std::uint64_t, int> received;
        std::thread user([&] {
          const auto receiving = pair.of_b.receive_notification(enough, received);
          pair.of_b.look();
          User::cancel(*receiving);
          pair.of_b.finish();
        });
        const auto call = pair.write(1, enough, 7);
        pair.of_a.finish();
        user.join();
        EXPECT_FALSE(call->ec) << call->ec.message();
        if (received[7] == 0) {
          std::error_code ec;
          EXPECT_EQ(User::number_of(pair.b->channel->receive_notification(milliseconds(1), ec)), 7U);
        }
        EXPECT_LE(received[7], 1);
        EXPECT_EQ(pair.b->channel->stats().pending_notifications, 0U);
      },
      steady_time);
}

TEST(Moments, AFenceIsAskedWhileWritesEnd) {
  int in_flight = 0;
  explore(500, [&] {
    Pair pair(1 + dice(3));
    std::vector<std::shared_ptr<Call>> calls;
    for (int i = 0; i < 3; ++i) {
      calls.push_back(pair.write(3));
      if (dice(2) == 0) {
        User::cancel(*calls.back());
      }
    }
    if (dice(3) == 0) {
      cut_connections();
    }
    std::thread owner([&] {
      const auto fence = pair.of_b.fence(milliseconds(dice(2) == 0 ? 20 : 1000));
      pair.of_b.finish();
      EXPECT_FALSE(fence->ec) << fence->ec.message();
    });
    pair.of_a.finish();
    owner.join();
    // Once the writes have ended, the owner of the memory can be sure of all of it.
    const auto fence = pair.of_b.fence(milliseconds(1000));
    pair.of_b.finish();
    EXPECT_FALSE(fence->ec) << fence->ec.message();
    for (const auto& call : calls) {
      if (call->ec == condition::may_still_land) {
        ++in_flight;
        pair.b->give_back(call->pages);
      }
    }
  });
  if (all_is_seen()) {
    EXPECT_GT(in_flight, 0);
  }
}

TEST(Moments, WhatWasAnsweredCountsThoughThePeerCloses) {
  explore(
      500,
      [] {
        Pair pair(1 + dice(3));
        bool received = false;
        std::thread user([&] {
          std::error_code ec;
          received = User::number_of(pair.b->channel->receive_notification(enough, ec)) == 7;
          EXPECT_FALSE(ec) << ec.message();
          pair.b->channel->close();
        });
        const auto call = pair.write(1 + dice(6), enough, 7);
        pair.of_a.finish();
        user.join();
        EXPECT_FALSE(call->ec) << call->ec.message();
      },
      steady_time);
}

TEST(Moments, ASendAndItsRecvAreGivenUpAtOnce) {
  Seen seen({{}, errc::cancelled});
  explore(
      500,
      [&] {
        Pair pair;
        std::shared_ptr<Call> recv;
        std::thread receiver([&] {
          recv = pair.of_b.pair_up(TransferKind::recv, 1, enough);
          pair.of_b.look();
          User::cancel(*recv);
          pair.of_b.finish();
        });
        const auto send = pair.of_a.pair_up(TransferKind::send, 1, enough);
        if (dice(2) == 0) {
          pair.of_a.look();
        }
        User::cancel(*send);
        pair.of_a.finish();
        receiver.join();
        seen.note(send->ec);
        EXPECT_TRUE(send->ec || !recv->ec) << "sent, and received by nobody";
      },
      steady_time);
}

TEST(Moments, TwoLanesFailAtOnce) {
  explore(
      400,
      [] {
        Pair pair(3);
        const auto call = pair.write(6);
        std::thread other([] { cut_connections(); });
        if (dice(2) == 0) {
          cut_connections();
        }
        pair.of_a.finish();
        other.join();
        EXPECT_TRUE(!call->ec || call->ec == condition::peer_failed || call->ec == condition::may_still_land)
            << call->ec.message();
        pair.expect_usable();
      },
      steady_time);
}

}  // namespace
}  // namespace kvferry::schedules
