// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/recycled.hpp>

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::detail {
namespace {

/// Of a kind of its own, so that nobody else has let any go.
template <int kind>
struct Thing {
  std::array<std::size_t, 16> marks{};
};

TEST(Recycled, AnObjectHasTheMemoryOfOneThatIsNoMore) {
  if constexpr (recycles) {
    auto first = make_recycled<Thing<1>>();
    auto second = make_recycled<Thing<1>>();
    const void* const memory = first.get();
    EXPECT_NE(memory, second.get());
    first.reset();
    EXPECT_EQ(make_recycled<Thing<1>>().get(), memory);
    EXPECT_EQ(make_recycled<Thing<1>>().get(), memory) << "only once";
  }
}

TEST(Recycled, MoreThanAFewAreFreed) {
  for (int round = 0; round < 2; ++round) {
    std::vector<std::shared_ptr<Thing<2>>> things(20);
    for (auto& thing : things) {
      thing = make_recycled<Thing<2>>();
    }
  }
}

TEST(Recycled, NoTwoThreadsHaveTheSameMemory) {
  std::atomic<int> shared{0};
  const auto work = [&](std::size_t mark) {
    for (int round = 0; round < 5000; ++round) {
      const auto thing = make_recycled<Thing<3>>();
      thing->marks.fill(mark);
      auto items = take_spare_vector<std::pair<std::size_t, int>>();
      items.assign(4, {mark, 3});
      for (const std::size_t found : thing->marks) {
        shared += found != mark ? 1 : 0;
      }
      for (const auto& item : items) {
        shared += item.first != mark ? 1 : 0;
      }
      let_go(std::move(items));
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t mark = 1; mark <= 4; ++mark) {
    threads.emplace_back(work, mark);
  }
  for (auto& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(shared, 0);
}

TEST(Recycled, AVectorHasTheMemoryOfOneThatWasLetGo) {
  using Item = std::pair<char, int>;
  EXPECT_EQ(take_spare_vector<Item>().capacity(), 0U);
  std::vector<Item> items(100);
  const Item* const memory = items.data();
  let_go(std::move(items));
  auto again = take_spare_vector<Item>();
  EXPECT_TRUE(again.empty());
  if constexpr (recycles) {
    EXPECT_EQ(again.capacity(), 100U);
    EXPECT_EQ(again.data(), memory);
  }
  EXPECT_EQ(take_spare_vector<Item>().capacity(), 0U) << "only once";
  let_go(std::vector<Item>(1000));
  EXPECT_EQ(take_spare_vector<Item>().capacity(), 0U) << "much memory is not kept";
}

}  // namespace
}  // namespace kvferry::detail
