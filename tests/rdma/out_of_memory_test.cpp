// SPDX-License-Identifier: Apache-2.0
// Memory that is used up in the middle of something: whatever it is, each operation ends, once.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/failing_allocations.hpp"
#include "rdma/rail_sides.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

constexpr std::size_t buffers_each = 8;

/// @return whether `action` ran without the allocation that was to fail, because it makes no more than that.
template <class Action>
bool runs_with(std::size_t allocations, Action action) {
  test::allocation_refused = false;
  test::allocations_left = allocations;
  try {
    action();
  } catch (const std::bad_alloc&) {
  }
  test::allocations_left = test::unlimited_allocations;
  return !test::allocation_refused;
}

TEST(OutOfMemory, AnOperationThatCannotBeTakenEnds) {
  for (const TransferKind kind : {TransferKind::write, TransferKind::read, TransferKind::send, TransferKind::recv}) {
    std::size_t allocations = 0;
    for (bool done = false; !done && allocations < 1'000; ++allocations) {
      SCOPED_TRACE(std::string(to_string(kind)) + " with " + std::to_string(allocations) + " allocations");
      Side a(8, buffers_each);
      Side b(8, buffers_each);
      a.join(b);
      const auto outcome = std::make_shared<Outcome>();
      const bool one = kind == TransferKind::write || kind == TransferKind::read;
      auto request = one ? one_sided(kind, {a.at(0, page)}, {1}) : paired(kind, {a.at(0, page)}, 1);
      test::allocation_refused = false;
      a.before_start = [allocations] { test::allocations_left = allocations; };
      try {
        a.start(std::move(request), outcome);
        if (outcome->calls != 0) {
          EXPECT_EQ(outcome->ec, std::errc::not_enough_memory);
        }
      } catch (const std::bad_alloc&) {
      }
      test::allocations_left = test::unlimited_allocations;
      done = !test::allocation_refused;
      a.protocol->fail(errc::connection_lost, "memory is used up");  // as a rail does then
      EXPECT_EQ(outcome->calls, 1);
      EXPECT_TRUE(a.protocol->idle());
    }
    EXPECT_GT(allocations, 2) << "else this tests nothing";
  }
}

TEST(OutOfMemory, WhoWaitsForAFenceOrARemovalIsToldOnce) {
  for (const bool is_fence : {true, false}) {
    std::size_t allocations = 0;
    for (bool done = false; !done && allocations < 1'000; ++allocations) {
      SCOPED_TRACE((is_fence ? "fence with " : "removal with ") + std::to_string(allocations) + " allocations");
      Side a(8, buffers_each);
      Side b(8, buffers_each);
      a.join(b);
      std::vector<int> told(50);
      std::vector<std::function<void()>> waiting;
      for (int& one : told) {
        waiting.emplace_back([&one] { ++one; });
      }
      done = runs_with(allocations, [&] {
        for (auto& waits : waiting) {
          is_fence ? a.protocol->fence(std::move(waits)) : a.protocol->region_removed(0, std::move(waits));
        }
      });
      a.protocol->fail(errc::connection_lost, "memory is used up");
      for (const auto& waits : waiting) {
        if (waits) {
          waits();  // as a rail does with what its protocol didn't take
        }
      }
      EXPECT_EQ(told, std::vector(told.size(), 1));
    }
    EXPECT_GT(allocations, 1) << "else this tests nothing";
  }
}

TEST(OutOfMemory, TheEndOfAConnectionNeedsNone) {
  const auto list = std::make_unique<WorkList>();
  Side a(8, buffers_each);
  Side b(8, buffers_each);
  a.join(b);
  const auto outcome = std::make_shared<Outcome>();
  a.start(one_sided(TransferKind::write, {a.at(0, page)}, {1}), outcome);
  ASSERT_TRUE(a.protocol->fill(*list)) << "the write is with the adapter";
  int told = 0;
  a.protocol->region_removed(0, [&told] { ++told; });
  const std::string why = "a sentence that is longer than what a string holds by itself";
  const bool needed_none = runs_with(0, [&] { a.protocol->fail(errc::connection_lost, why); });
  EXPECT_FALSE(needed_none) << "else there was no sentence to go without";
  EXPECT_EQ(outcome->calls, 1);
  EXPECT_EQ(outcome->ec, condition::may_still_land);
  EXPECT_EQ(told, 1);
}

/// A write with a notification, and a send with its recv, from one side to the other.
/// @param started how many of them have been taken.
void exchange(Side& a, Side& b, WorkList& list, const std::vector<std::shared_ptr<Outcome>>& outcomes, bool checksums,
              std::size_t& started) {
  TransferRequest write = one_sided(TransferKind::write, {a.at(page, page)}, {1}, {std::byte{1}});
  TransferRequest send = paired(TransferKind::send, {a.at(0, page)}, 1);
  write.checksums = send.checksums = checksums;
  b.start(paired(TransferKind::recv, {b.at(0, page)}, 1), outcomes[0]);
  ++started;
  a.start(std::move(send), outcomes[1]);
  ++started;
  a.start(std::move(write), outcomes[2]);
  ++started;
  for (bool busy = true; busy;) {
    busy = false;
    for (const auto& [from, to] : {std::pair{&a, &b}, std::pair{&b, &a}}) {
      busy = from->protocol->check_step() || busy;
      if (from->protocol->fill(list)) {
        busy = true;
        for (const ibv_send_wr* request = list.finish(); request != nullptr; request = request->next) {
          carry_out(*request, *to);
        }
        from->protocol->completed();
      }
      while (!to->arrived.empty()) {
        const auto message = std::move(to->arrived.front());
        to->arrived.pop_front();
        EXPECT_EQ(to->protocol->received(message), std::error_code()) << to->protocol->violation();
      }
    }
  }
}

void expect_each_to_end_once(bool checksums) {
  const auto list = std::make_unique<WorkList>();
  std::size_t allocations = 0;
  for (bool done = false; !done && allocations < 10'000; ++allocations) {
    SCOPED_TRACE(allocations);
    Side a(8, buffers_each);
    Side b(8, buffers_each);
    a.join(b);
    b.join(a);
    std::vector<std::shared_ptr<Outcome>> outcomes;
    for (int i = 0; i < 3; ++i) {
      outcomes.push_back(std::make_shared<Outcome>());
    }
    std::size_t started = 0;
    done = runs_with(allocations, [&] { exchange(a, b, *list, outcomes, checksums, started); });
    for (Side* const side : {&a, &b}) {
      side->protocol->fail(errc::connection_lost, "memory is used up");
      EXPECT_TRUE(side->protocol->idle());
    }
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
      const Outcome& outcome = *outcomes[i];
      EXPECT_LE(outcome.calls, 1) << i;
      EXPECT_TRUE(i >= started || outcome.calls == 1) << "operation " << i << " was taken and lost";
      EXPECT_TRUE(!done || (outcome.calls == 1 && outcome.count == 1)) << outcome.ec.message();
    }
  }
  EXPECT_GT(allocations, 20) << "else this tests nothing";
}

TEST(OutOfMemory, WhateverFailsEachOperationEndsOnce) { expect_each_to_end_once(false); }

TEST(OutOfMemory, SoDoesEachWithChecksums) { expect_each_to_end_once(true); }

}  // namespace
}  // namespace kvferry::rdma::testing
