// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <system_error>

#include <kvferry/error.hpp>

#include "handshakes.hpp"
#include "sides.hpp"

namespace kvferry::inline KVFERRY_ABI::schedules {

inline constexpr milliseconds enough{5'000};

inline TcpOptions options_of(std::size_t lanes) {
  TcpOptions options;
  options.log_sink = [](const LogRecord&) {};
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.lanes_per_peer = lanes;
  options.stripe_threshold = 2 * page_size;
  options.drain_timeout = milliseconds(50);
  return options;
}

/// Two channels that are connected, and a user of each.
struct Pair {
  explicit Pair(std::size_t lanes = 1)
      : a(std::make_shared<Side>(options_of(lanes))), b(std::make_shared<Side>(options_of(lanes))) {
    a->channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;
  ~Pair() {
    lose_handshake_messages(0);
    of_a.finish();
    of_b.finish();
    a->channel.reset();
    b->channel.reset();
    a->expect_quiet();
    b->expect_quiet();
    EXPECT_EQ(open_sockets(), 0U);
  }

  std::shared_ptr<Call> write(std::size_t pages, milliseconds timeout = enough, std::uint64_t notification = 0) {
    return of_a.transfer(TransferKind::write, b, pages, timeout, notification);
  }
  /// The connection can still be used. A call may find out that it is gone; the next one makes another.
  void expect_usable() {
    std::error_code ec;
    for (int tries = 0; tries < 3; ++tries) {
      const auto page = b->lend(1);
      a->channel->batched_write({ConstBuffer(a->page(0))}, {.peer_id = "b", .remote_indexes = page, .timeout = enough},
                                ec);
      b->give_back(page);
      if (ec != condition::peer_failed) {
        break;
      }
    }
    EXPECT_FALSE(ec) << ec.message();
  }

  std::shared_ptr<Side> a;
  std::shared_ptr<Side> b;
  User of_a{a, "b"};
  User of_b{b, "a"};
};

}  // namespace kvferry::schedules
