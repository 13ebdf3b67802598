// SPDX-License-Identifier: Apache-2.0
// Containers that keep what they have had, so that what comes and goes all the time allocates nothing.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include <kvferry/kit/fifo.hpp>
#include <kvferry/kit/spare_nodes.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

TEST(Fifo, HandsOutInOrderWhateverHasPassedThrough) {
  Fifo<int> fifo;
  int in = 0;
  int out = 0;
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < round % 7 + 1; ++i) {
      fifo.push_back(in++);
    }
    for (int i = 0; i < round % 5 + 1 && !fifo.empty(); ++i) {
      EXPECT_EQ(fifo.front(), out++);
      fifo.pop_front();
    }
    ASSERT_EQ(fifo.size(), static_cast<std::size_t>(in - out));
    ASSERT_EQ(std::vector<int>(fifo.begin(), fifo.end()).size(), fifo.size());
  }
}

TEST(Fifo, LetsGoOfAnItemWhenItIsTaken) {
  Fifo<std::shared_ptr<int>> fifo;
  const auto item = std::make_shared<int>(1);
  fifo.push_back(item);
  fifo.push_back(nullptr);
  fifo.pop_front();
  EXPECT_EQ(item.use_count(), 1);
}

TEST(Fifo, KeepsItsMemoryWhileItIsSmallAndGivesBackWhatIsLarge) {
  Fifo<int> fifo;
  fifo.push_back(1);
  const int* const place = &fifo.front();
  for (int round = 0; round < 10; ++round) {
    fifo.pop_front();
    fifo.push_back(round);
    EXPECT_EQ(&fifo.front(), place);
  }
  for (std::size_t i = 0; i < 4 * Fifo<int>::most_kept; ++i) {
    fifo.push_back(0);
  }
  EXPECT_GT(fifo.capacity(), Fifo<int>::most_kept);
  while (!fifo.empty()) {
    fifo.pop_front();
  }
  EXPECT_EQ(fifo.capacity(), 0U);
}

TEST(Fifo, DropsFromItsEndAndFromItsMiddle) {
  Fifo<int> fifo;
  for (int i = 0; i < 6; ++i) {
    fifo.push_back(i);
  }
  fifo.pop_front();
  fifo.pop_back();
  fifo.erase(fifo.begin());
  fifo.erase_if([](int item) { return item == 3; });
  EXPECT_EQ(std::vector<int>(fifo.begin(), fifo.end()), (std::vector<int>{2, 4}));
}

/// Of entries that come and go: the place of each.
template <class Map>
std::vector<const void*> places_of(Map& map, std::size_t rounds) {
  SpareNodes<Map> spares;
  std::vector<const void*> places;
  for (std::size_t round = 0; round < rounds; ++round) {
    const auto entry = spares.add(map, static_cast<int>(round));
    EXPECT_EQ(entry->first, static_cast<int>(round));
    EXPECT_EQ(entry->second, nullptr) << "left over from the entry before";
    entry->second = std::make_shared<int>(7);
    places.push_back(&*entry);
    const std::weak_ptr<int> held = spares.take(map, entry);
    EXPECT_TRUE(held.expired()) << "kept beyond the entry's end";
    EXPECT_TRUE(map.empty());
  }
  return places;
}

TEST(SpareNodes, AnEntryThatComesAndGoesHasOnePlace) {
  std::unordered_map<int, std::shared_ptr<int>> unordered;
  const auto places = places_of(unordered, 5);
  EXPECT_EQ(places, std::vector<const void*>(5, places.front()));
  std::multimap<int, std::shared_ptr<int>> ordered;
  const auto others = places_of(ordered, 5);
  EXPECT_EQ(others, std::vector<const void*>(5, others.front()));
}

TEST(SpareNodes, KeepsAFewOnly) {
  std::map<int, int> map;
  SpareNodes<std::map<int, int>> spares;
  for (int i = 0; i < 100; ++i) {
    spares.add(map, i)->second = i;
  }
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(spares.take(map, map.find(i)), i);
  }
  EXPECT_TRUE(map.empty());
}

}  // namespace
}  // namespace kvferry::kit
