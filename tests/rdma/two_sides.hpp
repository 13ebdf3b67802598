// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <system_error>
#include <utility>

#include "rdma/rail_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

/// Two sides of a rail that know each other, and what adapters do between them, when the test says so.
class TwoSides : public ::testing::Test {
 protected:
  static constexpr std::size_t buffers = 8;

  explicit TwoSides(std::size_t pages) : a(pages, buffers), b(pages, buffers) {
    a.join(b);
    b.join(a);
  }

  /// Posts a list of one side's and has the peer's memory and receive buffers get it. @return whether there was one.
  bool post(Side& from, Side& to) {
    if (!from.protocol->fill(*list_)) {
      return false;
    }
    for (const ibv_send_wr* request = list_->finish(); request != nullptr; request = request->next) {
      for (int i = 0; request->opcode == IBV_WR_SEND && i < request->num_sge; ++i) {
        const ibv_sge& piece = request->sg_list[i];
        EXPECT_EQ(from.slot_key(piece.addr, piece.length), piece.lkey) << "a message's key is that of its memory";
      }
      carry_out(*request, to);
    }
    return true;
  }

  void receive_all(Side& side) {
    while (!side.arrived.empty()) {
      const auto message = std::move(side.arrived.front());
      side.arrived.pop_front();
      EXPECT_EQ(side.protocol->received(message), std::error_code()) << side.protocol->violation();
    }
  }

  /// Posts, completes and takes what there is to. @return whether there was anything.
  bool move() {
    bool moved = false;
    for (bool busy = true; busy;) {
      busy = false;
      for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
        while (post(*from, *to)) {
          from->protocol->completed();
          receive_all(*to);
          busy = true;
        }
        busy = from->grow() || busy;
      }
      moved = moved || busy;
    }
    return moved;
  }

  Side a;
  Side b;
  std::unique_ptr<WorkList> list_ = std::make_unique<WorkList>();
};

}  // namespace kvferry::rdma::testing
