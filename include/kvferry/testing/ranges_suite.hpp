// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/ranges_base.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Byte ranges of the peer's regions, and objects that are blocks of their buffers: the right bytes in the right places,
/// and no others.
class RangesTests : public RangesBase {
 public:
  void OfAnySizeAtAnyOffset() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    expect_moved(a, b, a.objects({1, 4095, 9000, 4096, 100, 3, 1}),
                 {RemoteRange::contiguous(0, 0, 1), RemoteRange::contiguous(0, 4097, 4095),
                  RemoteRange::contiguous(0, 20'001, 9000), RemoteRange::contiguous(0, 8192, 4096),
                  RemoteRange::contiguous(0, 12'288, 100), RemoteRange::contiguous(0, 12'388, 3),
                  RemoteRange::contiguous(0, region_bytes - 1, 1)});
  }

  void StridedAtThePeer() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    expect_moved(a, b, a.objects({16 * 256, 5 * 7, 3 * 4096}),
                 {RemoteRange::strided(0, 128, 256, 1024, 16), RemoteRange::strided(0, 100'003, 7, 11, 5),
                  RemoteRange::strided(0, 200'000, 4096, 4096, 3)});
  }

  void StridedHere() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    const std::vector<LocalStride> strides{{256, 1024}, {0, 0}, {7, 11}, {512, 512}, {100, 0}};
    const std::vector<std::size_t> sizes{extent(strides[0], 16), 33, extent(strides[2], 5), 4 * 512, 100};
    expect_moved(a, b, a.objects(sizes),
                 {RemoteRange::contiguous(0, 128, 16 * 256), RemoteRange::contiguous(0, 90'000, 33),
                  RemoteRange::contiguous(0, 100'003, 35), RemoteRange::contiguous(0, 110'000, 2048),
                  RemoteRange::contiguous(0, 120'000, 100)},
                 strides);
  }

  void StridedOnBothSidesInOtherBlocks() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    const std::vector<LocalStride> strides{{256, 1000}, {30, 31}, {4096, 5000}};
    const std::vector<std::size_t> sizes{extent(strides[0], 12), extent(strides[1], 7), extent(strides[2], 3)};
    expect_moved(a, b, a.objects(sizes),
                 {RemoteRange::strided(0, 1, 1024, 4096, 3), RemoteRange::strided(0, 50'000, 21, 100, 10),
                  RemoteRange::strided(0, 60'000, 96, 97, 128)},
                 strides);
  }

  /// A page of tokens whose heads belong to two ranks of the other side: [token][head][bytes].
  void SlicesOfHeadsAreGathered() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    constexpr std::size_t tokens = 16;
    constexpr std::size_t head = 128;
    const LocalStride second_half{4 * head, 8 * head};
    const std::vector<LocalStride> strides(4, second_half);
    std::vector<RemoteRange> ranges;
    for (std::uint64_t page = 0; page < strides.size(); ++page) {
      ranges.push_back(RemoteRange::contiguous(0, (7 - page) * tokens * 4 * head, tokens * 4 * head));
    }
    expect_moved(a, b, a.objects(std::vector<std::size_t>(4, extent(second_half, tokens))), ranges, strides);
  }

  void SeveralRegionsInOneOperation() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair({}, {.regions = {{8, 4096}, {16, 512}, {4, 1}, {2, 100'000}}, .local_bytes = 0});
    expect_moved(a, b, a.objects({5000, 4, 600, 1000, 1}),
                 {RemoteRange::contiguous(3, 99'000, 5000), RemoteRange::contiguous(2, 0, 4),
                  RemoteRange::strided(1, 100, 200, 700, 3), RemoteRange::contiguous(0, 4000, 1000),
                  RemoteRange::contiguous(3, 0, 1)});
  }

  void PageSizesOfTheSidesDoNotMatter() {
    KVFERRY_TESTING_REQUIRE(ranges);
    NodeSpec a_spec{.regions = {{8, 4096}}};
    NodeSpec b_spec{.regions = {{8, 8192}}};
    a_spec.options.require_equal_page_sizes = b_spec.options.require_equal_page_sizes = true;
    const auto [a, b] = connected_pair(a_spec, b_spec);
    const Objects objects = a.objects({4096, 100});
    expect_moved(a, b, objects, {RemoteRange::contiguous(0, 6000, 4096), RemoteRange::contiguous(0, 65'436, 100)});
    expect_refused(a, b, objects, at({0, 1}), errc::page_size_mismatch, {"4096", "8192"});
  }

  void StridedObjectsOnPages() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    const std::vector<LocalStride> strides{{256, 1024}, {0, 0}, {100, 300}};
    const Objects objects = a.objects(std::vector<std::size_t>{extent(strides[0], 16), 10, extent(strides[2], 40)});
    const std::vector<std::uint64_t> pages{5, 0, 63};
    for (const TransferKind kind : one_sided_kinds()) {
      SCOPED_TRACE(to_string(kind));
      objects.fill(1);
      fill(b.region(), 2);
      TransferSpec spec = at(pages);
      spec.local_strides = strides;
      const auto transfer = start(kind, a, b, objects, spec);
      ASSERT_EQ(transfer->outcome(), done(3)) << transfer->diagnostic();
      for (std::size_t i = 0; i < 3; ++i) {
        const auto page = copy_of(b.page(pages[i]));
        std::size_t there = 0;
        for (const Run& run : runs(objects[i].size(), strides[i])) {
          ASSERT_EQ(std::memcmp(&objects[i][run.offset], &page[there], run.size), 0)
              << "object " << i << ", from " << there;
          there += run.size;
        }
      }
      EXPECT_TRUE(objects.guards_intact());
    }
    const std::vector<LocalStride> more_than_a_page{{256, 512}};
    const Objects large = a.objects({extent(more_than_a_page[0], 17)});
    TransferSpec spec = at(std::span(pages).first(1));
    spec.local_strides = more_than_a_page;
    expect_refused(a, b, large, spec, errc::object_too_large, {"4352", "4096"});
  }

  void BlocksThatAreLarge() {
    KVFERRY_TESTING_REQUIRE(ranges);
    constexpr std::size_t mebibyte = std::size_t{1} << 20;
    const std::vector<LocalStride> strides{{2 * mebibyte + 6, 2 * mebibyte + 50}, {0, 0}};
    const std::vector<std::size_t> sizes{extent(strides[0], 3), 3 * mebibyte};
    const auto [a, b] = connected_pair({.local_bytes = 12 * mebibyte}, {.regions = {{16, mebibyte}}});
    expect_moved(a, b, a.objects(sizes),
                 {RemoteRange::strided(0, 3, mebibyte + 3, mebibyte + 30, 6),
                  RemoteRange::strided(0, 13 * mebibyte, 3 * mebibyte / 2, 3 * mebibyte / 2, 2)},
                 strides);
    a.reuse_local_memory();
    expect_moved(a, b, a.objects({9 * mebibyte}), {RemoteRange::strided(0, 7, 3 * mebibyte, 4 * mebibyte + 1, 3)});
  }

  void ManySmallBlocks() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    const std::vector<LocalStride> strides{{3, 5}, {12, 13}};
    const std::vector<std::size_t> sizes{extent(strides[0], 12'000), extent(strides[1], 1000)};
    expect_moved(a, b, a.objects(sizes),
                 {RemoteRange::strided(0, 2, 6, 9, 6000), RemoteRange::strided(0, 200'000, 1, 3, 12'000)}, strides);
  }

  void TenThousandRanges() {
    KVFERRY_TESTING_REQUIRE(ranges);
    constexpr std::size_t count = 12'000;
    const auto [a, b] = connected_pair({.local_bytes = count * 80 + 4096}, {.regions = {{256, 4096}, {256, 4096}}});
    std::vector<RemoteRange> ranges;
    std::vector<std::size_t> sizes;
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t place = i * 7919 % count;  // 7919 is prime: each place once
      const std::uint64_t size = i % 31;
      ranges.push_back(i % 3 == 0 ? RemoteRange::strided(i % 2, place * 80, 1, 2, size)
                                  : RemoteRange::contiguous(i % 2, place * 80 + i % 5, size));
      sizes.push_back(size);
    }
    expect_moved(a, b, a.objects(sizes), ranges);
  }

  void EmptyObjects() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    expect_moved(a, b, a.objects({0, 10, 0, 0}),
                 {RemoteRange::contiguous(0, 5, 0), RemoteRange::contiguous(0, 5, 10),
                  RemoteRange::strided(0, region_bytes, 4096, 4096, 0), RemoteRange::strided(0, 0, 0, 0, 1000)});
    expect_moved(a, b, a.objects({0}), {RemoteRange::contiguous(0, region_bytes, 0)});
    const std::vector<LocalStride> strides{{16, 32}};
    expect_moved(a, b, a.objects({0}), {RemoteRange::contiguous(0, 0, 0)}, strides);
    const Objects nothing = a.objects({0});
    expect_refused(a, b, nothing, in_ranges(std::vector{RemoteRange::contiguous(0, region_bytes + 1, 0)}),
                   errc::range_out_of_bounds);
    expect_refused(a, b, nothing, in_ranges(std::vector{RemoteRange::contiguous(9, 0, 0)}), errc::unknown_region);
  }

  void OutOfBounds() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64});
    const std::uint64_t end = region_bytes;
    const std::vector<RemoteRange> good{
        RemoteRange::contiguous(0, end - 64, 64), RemoteRange::strided(0, end - 64, 32, 32, 2),
        RemoteRange::strided(0, end - 96, 32, 64, 2), RemoteRange::strided(0, 0, 1, (end - 1) / 63, 64),
        RemoteRange::strided(0, end - 64, 64, most, 1)};
    for (const RemoteRange& range : good) {
      expect_moved(a, b, objects, {range});
    }
    const std::vector<RemoteRange> bad{
        RemoteRange::contiguous(0, end - 63, 64),
        RemoteRange::contiguous(0, end, 64),
        RemoteRange::contiguous(0, most - 63, 64),
        RemoteRange::contiguous(0, most, 64),
        RemoteRange::strided(0, end - 63, 32, 32, 2),
        RemoteRange::strided(0, end - 95, 32, 64, 2),
        RemoteRange::strided(0, 0, 32, end - 31, 2),
        RemoteRange::strided(0, 0, 32, most, 2),
        RemoteRange::strided(0, 0, 1, (end - 1) / 63 + 1, 64),
        RemoteRange::strided(0, 64, 1, most / 63 + 1, 64),  // in 64 bits its end would lie at 63
        RemoteRange::strided(0, 64, 16, most / 3 + 1, 4),
    };
    for (const RemoteRange& range : bad) {
      SCOPED_TRACE(::testing::Message() << range.offset << ", " << range.count << " of " << range.size << " at "
                                        << range.stride);
      expect_refused(a, b, objects, in_ranges({&range, 1}), errc::range_out_of_bounds,
                     {"object 0", "262144", std::to_string(range.offset).c_str()});
    }
    // One bad range of many: the whole batch is refused.
    const std::vector<RemoteRange> last_is_bad{good[0], good[1], bad[0]};
    expect_refused(a, b, a.objects({64, 64, 64}), in_ranges(last_is_bad), errc::range_out_of_bounds, {"object 2"});
  }

  void AccessAndRegionsAreChecked() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const auto [a, b] = connected_pair(
        {},
        {.regions = {{4, 64}, {4, 64, Access::read}, {4, 64, Access::write}, {4, 64, Access::none}}, .local_bytes = 0});
    const Objects objects = a.objects({64, 64}).fill(1);
    for (const TransferKind kind : one_sided_kinds()) {
      for (std::uint32_t region = 0; region < 5; ++region) {
        SCOPED_TRACE(::testing::Message() << to_string(kind) << " of region " << region);
        if (region < b->regions().size()) {
          fill_constant(b.region(region), background);
        }
        const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 0, 64),
                                              RemoteRange::contiguous(region, 64, 64)};
        const auto transfer = start(kind, a, b, objects, without_checksums(in_ranges(ranges)));
        const Access wanted = kind == TransferKind::write ? Access::write : Access::read;
        if (region == 4) {
          EXPECT_EQ(transfer->outcome(), failed(errc::unknown_region));
        } else if (allows(b->regions()[region].peer_access, wanted)) {
          EXPECT_EQ(transfer->outcome(), done(2)) << transfer->diagnostic();
        } else {
          EXPECT_EQ(transfer->outcome(), failed(errc::access_denied));
          EXPECT_TRUE(b.untouched(region));
        }
        EXPECT_TRUE(transfer->consistent());
      }
    }
  }

  void SenselessOnesAreRefused() {
    KVFERRY_TESTING_REQUIRE(ranges);
    const Pair nodes = connected_pair();
    Node& a = nodes.a;  // a lambda can't capture structured bindings
    Node& b = nodes.b;
    const Objects two = a.objects({64, 100});
    const RemoteRange first = RemoteRange::contiguous(0, 0, 64);
    const auto refuse_second = [&](const RemoteRange& range, std::initializer_list<const char*> parts) {
      const std::vector<RemoteRange> ranges{first, range};
      expect_refused(a, b, two, in_ranges(ranges), errc::invalid_range, parts);
    };
    refuse_second(RemoteRange::contiguous(0, 100, 99), {"object 1", "99", "100"});
    refuse_second(RemoteRange::contiguous(0, 100, 101), {"object 1", "101", "100"});
    refuse_second(RemoteRange::strided(0, 100, 50, 60, 3), {"150", "100"});
    refuse_second(RemoteRange::strided(0, 100, 50, 60, 0), {"object 1"});
    refuse_second(RemoteRange::strided(0, 100, 50, 49, 2), {"overlap", "49"});
    refuse_second(RemoteRange::strided(0, 100, 50, 0, 2), {"overlap"});
    // 2^64 + 100 bytes.
    refuse_second(RemoteRange::strided(0, 0, (std::uint64_t{1} << 62) + 25, most, 4), {"2^64"});

    const std::vector<RemoteRange> good{first, RemoteRange::contiguous(0, 100, 100)};
    TransferSpec both = in_ranges(good);
    const std::vector<std::uint64_t> indexes{0, 1};
    both.remote_indexes = indexes;
    expect_refused(a, b, two, both, errc::invalid_range, {"indexes"});
    expect_refused(a, b, two, in_ranges(std::span(good).first(1)), errc::count_mismatch, {"1", "2"});

    for (const LocalStride& stride : std::initializer_list<LocalStride>{{40, 39}, {40, 0}, {40, 50}, {101, 200}}) {
      const std::vector<LocalStride> strides{{}, stride};
      expect_refused(a, b, two, in_ranges(good, strides), errc::invalid_range,
                     {"object 1", "100", std::to_string(stride.block_size).c_str()});
    }
    const std::vector<LocalStride> one(1);
    expect_refused(a, b, two, in_ranges(good, one), errc::count_mismatch, {"1", "2"});
    expect_usable(a, b);
  }

  void OfARangeThatIsNamedTwiceTheLastWins() {
    KVFERRY_TESTING_REQUIRE(ranges);
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    expect_moved(a, b, a.objects({1000, 1000, 600}),
                 {RemoteRange::contiguous(0, 10'000, 1000), RemoteRange::contiguous(0, 10'500, 1000),
                  RemoteRange::strided(0, 9900, 200, 400, 3)});
  }

  void ANotificationFollowsRanges() {
    KVFERRY_TESTING_REQUIRE(ranges);
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair({.local_bytes = std::size_t{4} << 20}, {.regions = {{1, std::size_t{4} << 20}}});
    for (const std::size_t size : {std::size_t{30}, std::size_t{3'000'000}}) {
      const Objects objects = a.objects({size}).fill(size);
      const std::vector<RemoteRange> ranges{RemoteRange::strided(0, 1, size / 10, size / 10 + 1, 10)};
      const auto payload = std::as_bytes(std::span("there", 5));
      const auto transfer = start(TransferKind::write, a, b, objects, notifying(payload, in_ranges(ranges)));
      const auto notification = start_receive_notification(b);
      EXPECT_FALSE(notification->error());
      EXPECT_TRUE(std::ranges::equal(std::get<1>(notification->results()).payload, payload));
      const MutableBuffer region = b.region();
      const MutableBuffer object = objects[0];
      for (std::size_t block = 0; block < 10; ++block) {
        const auto arrived = std::span(region.data() + 1 + block * (size / 10 + 1), size / 10);
        const auto sent = std::span(object.data() + block * (size / 10), size / 10);
        EXPECT_TRUE(std::ranges::equal(arrived, sent)) << "block " << block << " of " << size << " bytes";
      }
      EXPECT_EQ(transfer->outcome(), done(1)) << transfer->diagnostic();
      a.reuse_local_memory();
    }
  }

  void UnregisteredObjects() {
    KVFERRY_TESTING_REQUIRE(ranges);
    KVFERRY_TESTING_REQUIRE(unregistered_objects);
    const auto [a, b] = connected_pair();
    const std::vector<LocalStride> strides{{100, 128}, {4096, 8192}};
    const std::vector<std::size_t> sizes{extent(strides[0], 20), extent(strides[1], 10)};
    std::vector<std::byte> memory(Objects::footprint(sizes));
    expect_moved(a, b, Objects(memory, sizes),
                 {RemoteRange::contiguous(0, 3, 2000), RemoteRange::strided(0, 8192, 1024, 2048, 40)}, strides);
  }

  void PairedOperationsTakeNone() {
    KVFERRY_TESTING_REQUIRE(ranges);
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64});
    const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 0, 64)};
    const std::vector<LocalStride> strides{{32, 32}};
    for (const TransferKind kind : {TransferKind::send, TransferKind::recv}) {
      EXPECT_EQ(start(kind, a, b, objects, in_ranges(ranges))->outcome(), failed(errc::not_supported));
      EXPECT_EQ(start(kind, a, b, objects, in_ranges({}, strides))->outcome(), failed(errc::not_supported));
    }
  }
};

KVFERRY_TESTING_SUITE(RangesTest, RangesTests, OfAnySizeAtAnyOffset, StridedAtThePeer, StridedHere,
                      StridedOnBothSidesInOtherBlocks, SlicesOfHeadsAreGathered, SeveralRegionsInOneOperation,
                      PageSizesOfTheSidesDoNotMatter, StridedObjectsOnPages, BlocksThatAreLarge, ManySmallBlocks,
                      TenThousandRanges, EmptyObjects, OutOfBounds, AccessAndRegionsAreChecked, SenselessOnesAreRefused,
                      OfARangeThatIsNamedTwiceTheLastWins, ANotificationFollowsRanges, UnregisteredObjects,
                      PairedOperationsTakeNone);

}  // namespace kvferry::testing
