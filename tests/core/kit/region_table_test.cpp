// SPDX-License-Identifier: Apache-2.0
// The numbers of regions that come and go.
#include <gtest/gtest.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/kit/region_table.hpp>

#include "common/allocation_limit.hpp"
#include "peers_regions.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

TEST(RegionTable, ANumberIsGivenOnceAndWhatWasRemovedTakesNoMemory) {
  RegionTable table(std::vector<MemoryRegion>(2, some_region));
  const auto given = table.now();
  EXPECT_FALSE(given->outdated());
  EXPECT_EQ(given->refusal(2), errc::unknown_region);
  errc refusal{};
  for (std::uint32_t number = 2; number < 100'002; ++number) {
    ASSERT_EQ(add_to(table), number);
    ASSERT_TRUE(table.remove(number, refusal).has_value());
    table.gone();
  }
  const auto now = table.now();
  EXPECT_EQ(now->all().size(), 2U);
  EXPECT_EQ(now->refusal(100'001), errc::region_gone);
  EXPECT_EQ(now->refusal(100'002), errc::unknown_region);
  EXPECT_TRUE(given->outdated());
  EXPECT_NE(given->find(1), nullptr) << "who has the list keeps it as it was";
  EXPECT_FALSE(table.remove(2, refusal).has_value());
  EXPECT_EQ(refusal, errc::region_gone);
  EXPECT_FALSE(table.remove(100'002, refusal).has_value());
  EXPECT_EQ(refusal, errc::unknown_region);
}

TEST(RegionTable, ThoseThatAreBeingRemovedCount) {
  RegionTable table(std::vector<MemoryRegion>(RegionTable::max_regions, some_region));
  const auto refused = [&] {
    try {
      (void)add_to(table);
    } catch (const TransferError& error) {
      return error.code();
    }
    return std::error_code();
  };
  EXPECT_EQ(refused(), errc::resource_limit);
  errc refusal{};
  ASSERT_TRUE(table.remove(7, refusal).has_value());
  EXPECT_EQ(refused(), errc::resource_limit);
  table.gone();
  EXPECT_FALSE(refused());
  EXPECT_EQ(refused(), errc::resource_limit);
  EXPECT_EQ(table.now()->find(7), nullptr);
  EXPECT_EQ(table.now()->find(8)->number, 8U);
}

TEST(RegionTable, WhatCannotBeEnteredIsUndone) {
  RegionTable table({});
  std::vector<std::uint32_t> prepared;
  std::vector<std::uint32_t> undone;
  prepared.reserve(1);
  undone.reserve(1);
  EXPECT_THROW(table.add(
                   some_region,
                   [&](const LocalRegion& added) {
                     prepared.push_back(added.number);
                     test::allocations_left = 0;
                   },
                   [&](const LocalRegion& added) {
                     test::allocations_left = test::unlimited_allocations;
                     undone.push_back(added.number);
                   }),
               std::bad_alloc);
  test::allocations_left = test::unlimited_allocations;
  EXPECT_EQ(undone, prepared);
  EXPECT_TRUE(table.now()->all().empty());
  EXPECT_EQ(add_to(table), 0U);
}

TEST(RegionTable, WhatCannotBeMadeReadyHasNoNumber) {
  RegionTable table({});
  EXPECT_THROW(table.add(some_region, [](const LocalRegion&) { throw std::runtime_error("no"); }), std::runtime_error);
  EXPECT_TRUE(table.now()->all().empty());
  EXPECT_EQ(add_to(table), 0U);
}

}  // namespace
}  // namespace kvferry::kit::tests
