// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/testing/conformance_test.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// For tests of operations that end without success: a peer that can be held up, transfers with more bytes than any
/// socket's buffer holds, and a check that buffers don't change afterwards.
class StalledPeerBase : public ConformanceBase {
 protected:
  static constexpr std::size_t big_pages = 16;
  static constexpr std::size_t big_page = std::size_t{1} << 20;

  /// A transfer with the stalled peer, and its objects.
  struct Stalled {
    TransferKind kind;
    std::shared_ptr<Transfer> transfer;
    Objects objects;
  };

  /// The second can be paused.
  [[nodiscard]] Pair pair_with_pausable_peer() {
    return connected_pair({.regions = {{16}}, .local_bytes = 5 * big_pages * big_page},
                          {.regions = {{2 * big_pages, big_page}}, .local_bytes = 64 * 1024, .pausable = true});
  }

  [[nodiscard]] Stalled start_big(TransferKind kind, Pair nodes,
                                  std::optional<std::chrono::milliseconds> timeout = {}) {
    return start_stalled(kind, nodes, nodes.a.objects(big_pages, big_page), timeout);
  }
  [[nodiscard]] Stalled start_small(TransferKind kind, Pair nodes,
                                    std::optional<std::chrono::milliseconds> timeout = {}) {
    return start_stalled(kind, nodes, nodes.a.objects({100, 1, 4096}), timeout);
  }

  /// Starts one of each kind of transfer that the peer, paused, won't answer.
  [[nodiscard]] std::vector<Stalled> start_one_of_each(Pair nodes) {
    std::vector<Stalled> all;
    for (const TransferKind kind : kinds()) {
      all.push_back(start_big(kind, nodes));
    }
    return all;
  }

  /// The code of an operation that ended for this reason with bytes on their way.
  [[nodiscard]] static errc in_flight(errc code) {
    return code == errc::timed_out   ? errc::timed_out_in_flight
           : code == errc::cancelled ? errc::cancelled_in_flight
                                     : errc::closed_in_flight;
  }

  /// A send and its recv, of which either may have ended early for one of these reasons. On a machine so busy that the peer doesn't run
  /// until the connection is given up, one of them ends with bytes on their way and the other with the connection.
  /// @return whether that was so.
  [[nodiscard]] static bool expect_ended_early(const Outcome& sending, const Outcome& receiving,
                                               std::initializer_list<errc> reasons) {
    const auto given_up = [&](const Outcome& outcome) {
      return std::ranges::any_of(reasons, [&](errc code) { return code != errc::peer_cancelled && outcome.error == in_flight(code); });
    };
    const bool connection_ended = given_up(sending) || given_up(receiving);
    for (const Outcome& outcome : {sending, receiving}) {
      EXPECT_TRUE(!outcome.error || std::ranges::any_of(reasons, [&](errc code) { return outcome.error == code; }) || given_up(outcome) ||
                  (connection_ended && outcome.error == condition::peer_failed))
          << outcome;
    }
    return connection_ended;
  }

  /// Connects anew after a connection has been given up by one side, which the other may not have noticed: its fence ends when it has.
  void connect_again(Node& a, Node& b) {
    std::error_code ignored;
    a->fence(b.id(), limit(), ignored);
    b->fence(a.id(), limit(), ignored);
    connect(a, b);
  }

  /// Whether it ended for this reason, with bytes on their way or not; or with success, and then really (a transport
  /// may reach a peer's memory without the peer).
  void expect_ended(const Stalled& stalled, errc code, const Node& peer) {
    SCOPED_TRACE(to_string(stalled.kind));
    const Outcome outcome = stalled.transfer->outcome();
    EXPECT_TRUE(stalled.transfer->consistent());
    if (outcome.error) {
      EXPECT_TRUE(outcome.error == code || outcome.error == in_flight(code))
          << outcome << " " << stalled.transfer->diagnostic();
      return;
    }
    ASSERT_TRUE(is_one_sided(stalled.kind)) << "met by nobody, but done";
    for (std::size_t i = 0; stalled.kind == TransferKind::write && i < stalled.objects.count(); ++i) {
      EXPECT_TRUE(matches(peer.page(i).first(stalled.objects[i].size()), stalled_seed + i))
          << "done, but not in the peer's memory";
    }
  }

  /// Resumes the peer, and checks that it doesn't touch the buffers of ended operations.
  void expect_quiet(Pair nodes, std::vector<Stalled> ended) {
    for (Stalled& stalled : ended) {
      stalled.objects.fill(4242);
    }
    nodes.b.resume();
    // Drains what was on its way, and ends with all of it handled.
    nodes.b.destroy_channel();
    for (const Stalled& stalled : ended) {
      EXPECT_TRUE(stalled.objects.match(4242)) << to_string(stalled.kind) << " has ended";
    }
  }

  static constexpr std::uint64_t stalled_seed = 77;

 private:
  [[nodiscard]] Stalled start_stalled(TransferKind kind, Pair nodes, Objects objects,
                                      std::optional<std::chrono::milliseconds> timeout) {
    objects.fill(stalled_seed);
    auto transfer = start_any(kind, nodes.a, nodes.b, objects, timeout);
    return {kind, std::move(transfer), std::move(objects)};
  }
};

}  // namespace kvferry::testing
