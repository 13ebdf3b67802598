// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Write and read: the right bytes in the right places, and no others.
class OneSidedTests : public ConformanceBase {
 protected:
  static constexpr TransferKind write = TransferKind::write;
  static constexpr TransferKind read = TransferKind::read;

  /// Whether the pages at `indexes` hold the patterns from `seed` on, and all others of the region the background.
  [[nodiscard]] static ::testing::AssertionResult region_holds(const Node& node, const Objects& objects,
                                                               const std::vector<std::uint64_t>& indexes,
                                                               std::uint64_t seed, std::size_t region = 0) {
    const std::uint64_t pages = node->regions()[region].page_count();
    for (std::uint64_t page = 0; page < pages; ++page) {
      std::size_t size = 0;
      std::uint64_t expected = 0;
      for (std::size_t i = 0; i < indexes.size(); ++i) {
        if (indexes[i] == page) {
          size = objects[i].size();
          expected = seed + i;
        }
      }
      if (auto result = page_holds(node.page(page, region), size, expected); !result) {
        return result << " (page " << page << ")";
      }
    }
    return ::testing::AssertionSuccess();
  }

  /// Gives each page of a region a pattern: page i that of `seed + i`.
  static void fill_pages(const Node& node, std::uint64_t seed, std::size_t region = 0) {
    for (std::uint64_t page = 0; page < node->regions()[region].page_count(); ++page) {
      fill(node.page(page, region), seed + page);
    }
  }

 public:
  void WritesScatteredPages() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{5, 0, 63, 6, 7, 31};
    const Objects objects = a.objects({4096, 4096, 4096, 4096, 4096, 4096}).fill(10);
    const auto transfer = start(write, a, b, objects, at(indexes));
    EXPECT_EQ(transfer->outcome(), done(6)) << transfer->diagnostic();
    EXPECT_TRUE(transfer->consistent());
    EXPECT_TRUE(region_holds(b, objects, indexes, 10));
    EXPECT_TRUE(objects.match(10));
  }

  void WritesNoMoreThanTheObject() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{1, 2, 3, 5, 62, 9};
    const Objects objects = a.objects({1, 4095, 4096, 100, 2048, 7}).fill(20);
    EXPECT_EQ(start(write, a, b, objects, at(indexes))->outcome(), done(6));
    EXPECT_TRUE(region_holds(b, objects, indexes, 20));
  }

  void ReadsScatteredPages() {
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    fill_pages(b, 30);
    const std::vector<std::uint64_t> indexes{63, 1, 0, 17, 18, 19};
    const Objects objects = a.objects({4096, 1, 4095, 100, 4096, 8});
    const auto transfer = start(read, a, b, objects, at(indexes));
    EXPECT_EQ(transfer->outcome(), done(6)) << transfer->diagnostic();
    EXPECT_TRUE(transfer->consistent());
    for (std::size_t i = 0; i < indexes.size(); ++i) {
      EXPECT_TRUE(matches(objects[i], 30 + indexes[i]));
    }
    EXPECT_TRUE(objects.guards_intact());
    for (std::uint64_t page = 0; page < 64; ++page) {
      EXPECT_TRUE(matches(b.page(page), 30 + page));
    }
  }

  void BlockingForms() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{3, 4};
    const Objects source = a.objects({4096, 100}).fill(40);
    const Objects target = a.objects({4096, 100});
    TransferSpec spec = at(indexes);
    spec.peer_id = b.id();

    EXPECT_EQ(a->batched_write(source.readable(), spec), 2U);
    EXPECT_TRUE(region_holds(b, source, indexes, 40));
    EXPECT_EQ(a->batched_read(target.writable(), spec), 2U);
    EXPECT_TRUE(target.match(40));

    std::error_code error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(a->batched_write(source.fill(50).readable(), spec, error), 2U);
    EXPECT_FALSE(error) << error.message();
    EXPECT_TRUE(region_holds(b, source, indexes, 50));
    error = std::make_error_code(std::errc::io_error);
    EXPECT_EQ(a->batched_read(target.writable(), spec, error), 2U);
    EXPECT_FALSE(error) << error.message();
    EXPECT_TRUE(target.match(50));
  }

  void BlockingFormsReportErrors() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair({}, {.id = "the-peer", .regions = {{64}}});
    const Objects objects = a.objects({16});
    const std::uint64_t index = 987654321;
    TransferSpec spec = at({&index, 1});
    spec.peer_id = b.id();
    std::string diagnostic;
    spec.diagnostic = &diagnostic;
    for (const TransferKind kind : {write, read}) {
      SCOPED_TRACE(to_string(kind));
      std::error_code error;
      diagnostic.clear();
      EXPECT_EQ(kind == write ? a->batched_write(objects.readable(), spec, error)
                              : a->batched_read(objects.writable(), spec, error),
                0U);
      EXPECT_EQ(error, errc::index_out_of_range);
      EXPECT_NE(diagnostic.find("987654321"), std::string::npos) << diagnostic;
      try {
        kind == write ? a->batched_write(objects.readable(), spec) : a->batched_read(objects.writable(), spec);
        ADD_FAILURE() << "did not throw";
      } catch (const TransferError& thrown) {
        EXPECT_EQ(thrown.code(), errc::index_out_of_range);
        EXPECT_EQ(thrown.transferred(), 0U);
        const std::string what = thrown.what();
        for (const char* part : {"the-peer", "987654321", "64"}) {
          EXPECT_NE(what.find(part), std::string::npos) << part << " is not in: " << what;
        }
      }
    }
    EXPECT_TRUE(b.untouched());
  }

  void BothSidesMayInitiate() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{8, 2};
    const Objects to_b = a.objects({4096, 4096}).fill(60);
    const Objects to_a = b.objects({4096, 4096}).fill(70);
    const auto forth = start(write, a, b, to_b, at(indexes));
    const auto back = start(write, b, a, to_a, at(indexes));
    EXPECT_EQ(forth->outcome(), done(2));
    EXPECT_EQ(back->outcome(), done(2));
    EXPECT_TRUE(region_holds(b, to_b, indexes, 60));
    EXPECT_TRUE(region_holds(a, to_a, indexes, 70));
  }

  void SeveralRegionsOfDifferentPages() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const std::vector<RegionSpec> regions{{8, 4096}, {16, 512}, {4, 1}, {2, 100'000}};
    const auto [a, b] = connected_pair({.regions = {}}, {.regions = regions, .local_bytes = 0});
    const std::vector<std::uint64_t> indexes{1, 0};
    std::vector<Objects> sources;
    for (std::uint32_t region = 0; region < regions.size(); ++region) {
      sources.push_back(a.objects({regions[region].page_size, 1}).fill(80 + 10 * region));
      EXPECT_EQ(start(write, a, b, sources.back(), at(indexes, region))->outcome(), done(2));
    }
    for (std::uint32_t region = 0; region < regions.size(); ++region) {
      SCOPED_TRACE(region);
      EXPECT_TRUE(region_holds(b, sources[region], indexes, 80 + 10 * region, region));
      const Objects target = a.objects({1, 1});
      EXPECT_EQ(start(read, a, b, target, at(indexes, region))->outcome(), done(2));
      EXPECT_TRUE(target.match(80 + 10 * region));
    }
  }

  void ZeroSizedObjects() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    const std::vector<std::uint64_t> indexes{3, 4, 5};
    const Objects source = a.objects({0, 10, 0}).fill(90);
    EXPECT_EQ(start(write, a, b, source, at(indexes))->outcome(), done(3));
    EXPECT_TRUE(region_holds(b, source, indexes, 90));
    const Objects target = a.objects({0, 10, 0});
    EXPECT_EQ(start(read, a, b, target, at(indexes))->outcome(), done(3));
    EXPECT_TRUE(target.match(90));
    const Objects nothing = a.objects({0});
    EXPECT_EQ(start(write, a, b, nothing, at({0}))->outcome(), done(1));
    EXPECT_EQ(start(read, a, b, nothing, at({0}))->outcome(), done(1));
    EXPECT_EQ(start(write, a, b, nothing, at({64}))->outcome(), failed(errc::index_out_of_range));
  }

  void UnregisteredObjects() {
    KVFERRY_TESTING_REQUIRE(unregistered_objects);
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    std::vector<std::byte> memory(2 * 4096);
    std::vector<std::byte> copy(2 * 4096);
    fill(memory, 100);
    const MutableBuffer source(memory);
    const MutableBuffer target(copy);
    const std::vector<std::uint64_t> indexes{9, 1};
    TransferSpec spec = at(indexes);
    spec.peer_id = b.id();
    EXPECT_EQ(a->batched_write({source.first(4096), source.subspan(4096)}, spec), 2U);
    EXPECT_EQ(a->batched_read({target.first(4096), target.subspan(4096)}, spec), 2U);
    EXPECT_EQ(copy, memory);
  }

  void DuplicatesInARead() {
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    fill_pages(b, 110);
    const std::vector<std::uint64_t> indexes{7, 7, 3, 7, 3};
    const Objects objects = a.objects({4096, 100, 4096, 4096, 1});
    EXPECT_EQ(start(read, a, b, objects, at(indexes))->outcome(), done(5));
    for (std::size_t i = 0; i < indexes.size(); ++i) {
      EXPECT_TRUE(matches(objects[i], 110 + indexes[i]));
    }
    EXPECT_TRUE(objects.guards_intact());
  }

  void DuplicatesInAWrite() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({4096, 4096});
    fill_constant(objects[0], std::byte{1});
    fill_constant(objects[1], std::byte{2});
    EXPECT_EQ(start(write, a, b, objects, at({5, 5}))->outcome(), done(2));
    EXPECT_TRUE(is_constant(b.page(5), std::byte{2})) << "the last one is to win";
    EXPECT_TRUE(is_constant(b.page(4), background));
    EXPECT_TRUE(is_constant(b.page(6), background));
  }

  void OneBufferToManyPages() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects one = a.objects({1000}).fill(120);
    const std::vector<ConstBuffer> same(64, one[0]);
    const std::vector<std::uint64_t> indexes = consecutive(0, 64);
    TransferSpec spec = at(indexes);
    spec.peer_id = b.id();
    EXPECT_EQ(a->batched_write(same, spec), 64U);
    for (std::uint64_t page = 0; page < 64; ++page) {
      EXPECT_TRUE(page_holds(b.page(page), 1000, 120)) << page;
    }
  }

  void OneLargeObject() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const std::size_t size = std::size_t{64} << 20;
    const auto [a, b] =
        connected_pair({.regions = {}, .local_bytes = size + 4096}, {.regions = {{1, size}}, .local_bytes = 0});
    Objects objects = a.objects({size}).fill(130);
    EXPECT_EQ(start(write, a, b, objects, at({0}))->outcome(), done(1));
    EXPECT_TRUE(matches(b.page(0), 130));
    fill_constant(objects[0], background);
    EXPECT_EQ(start(read, a, b, objects, at({0}))->outcome(), done(1));
    EXPECT_TRUE(objects.match(130));
  }

  void WritesFollowEachOther() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({4096});
    const Objects target = b.objects({4096});
    for (std::uint64_t i = 0; i < 200; ++i) {
      fill(source[0], i);
      ASSERT_EQ(start(write, a, b, source, at({12}))->outcome(), done(1));
      ASSERT_TRUE(matches(b.page(12), i));
      ASSERT_EQ(start(write, b, a, target, at({13}))->outcome(), done(1));
      ASSERT_EQ(start(read, a, b, source, at({12}))->outcome(), done(1));
      ASSERT_TRUE(matches(source[0], i));
    }
  }

  void LocalMemoryIndices() {
    Node& node = add_node({.regions = {{8, 4096}, {4, 100}}, .local_bytes = 0});
    const auto in = [&](std::size_t region, std::size_t offset, std::size_t size) -> ConstBuffer {
      return ConstBuffer(node.region(region)).subspan(offset, size);
    };
    EXPECT_EQ(node->get_local_mem_indices({in(0, 0, 4096), in(0, 7 * 4096, 1), in(0, 3 * 4096, 4096)}),
              (std::vector<std::uint64_t>{0, 7, 3}));
    EXPECT_EQ(node->get_local_mem_indices({in(1, 300, 100), in(1, 0, 7)}, 1), (std::vector<std::uint64_t>{3, 0}));
    EXPECT_TRUE(node->get_local_mem_indices({}).empty());

    const auto expect_error = [&](ConstBuffer object, std::uint32_t region, errc code) {
      try {
        const auto indexes = node->get_local_mem_indices({in(0, 0, 1), object}, region);
        ADD_FAILURE() << "no error, but " << indexes.size() << " indexes";
      } catch (const TransferError& error) {
        EXPECT_EQ(error.code(), code) << error.what();
      }
    };
    const std::vector<std::byte> elsewhere(4096);
    expect_error(in(0, 1, 10), 0, errc::not_in_region);
    expect_error(in(0, 4095, 1), 0, errc::not_in_region);
    expect_error(in(1, 0, 10), 0, errc::not_in_region);
    expect_error(elsewhere, 0, errc::not_in_region);
    expect_error({node.region(0).data() + 7 * 4096, 4097}, 0, errc::not_in_region);
    expect_error({node.region(0).data(), static_cast<std::size_t>(-1)}, 0, errc::not_in_region);
    expect_error({}, 0, errc::not_in_region);
    expect_error(in(0, 0, 1), 2, errc::unknown_region);
    expect_error(in(0, 0, 1), UINT32_MAX, errc::unknown_region);
  }
};

KVFERRY_TESTING_SUITE(OneSidedTest, OneSidedTests, WritesScatteredPages, WritesNoMoreThanTheObject, ReadsScatteredPages,
                      BlockingForms, BlockingFormsReportErrors, BothSidesMayInitiate, SeveralRegionsOfDifferentPages,
                      ZeroSizedObjects, UnregisteredObjects, DuplicatesInARead, DuplicatesInAWrite,
                      OneBufferToManyPages, OneLargeObject, WritesFollowEachOther, LocalMemoryIndices);

}  // namespace kvferry::testing
